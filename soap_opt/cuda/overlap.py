"""Refreshes hidden behind the next forward pass: on a stream of their own, after the step, waited for by whoever reads.

A refresh (QR, v permuted, m turned) touches gram, basis, exp_avg and exp_avg_sq, and nothing that a forward or backward pass
reads. So a step may end with the refresh still running, if

- the refresh begins after everything that the step has enqueued;
- the next step, and whatever else reads or writes the state, waits for it: on the device, by event, not on the host;
- no memory that the refresh uses is handed out again before it is done (``Tensor.record_stream``).

:class:`Overlap` keeps these three promises for any number of devices and param groups. It knows nothing of SOAP. Inside a CUDA
graph's capture it runs in place: a graph has its own order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Overlap:
    """Runs what it is given behind the current stream, one side stream for each device.

    Args:
        backend: what has ``Stream``, ``current_stream``, ``stream`` and ``is_current_stream_capturing`` as torch.cuda has
            them; the tests' stand-in records.
    """

    def __init__(self, backend: Any = torch.cuda) -> None:
        self._backend = backend
        self._streams: dict[torch.device, Any] = {}
        self._pending: dict[torch.device, Any] = {}  # of each device the event after what was enqueued last

    @contextmanager
    def behind(self, device: torch.device, tensors: Iterable[Tensor]) -> Iterator[None]:
        """What is enqueued on ``device`` inside runs after all that its current stream holds so far. Nothing inside may wait
        for it, and what it writes may be read after :meth:`wait` only.

        Args:
            tensors: everything that is read or written inside and was allocated on another stream, which is all that is not
                allocated inside.
        """
        backend = self._backend
        if device.type != "cuda" or backend.is_current_stream_capturing():
            # in order with what is still running behind: it may hold the same tensors
            self.wait(device)
            yield
            return
        side = self._streams.get(device)
        if side is None:
            side = self._streams[device] = backend.Stream(device)
        side.wait_stream(backend.current_stream(device))
        try:
            with backend.stream(side):
                yield
        finally:  # what was enqueued before an exception runs all the same
            for tensor in tensors:
                tensor.record_stream(side)
            self._pending[device] = side.record_event()

    def wait(self, device: torch.device | None = None) -> None:
        """Let the current stream (of ``device``; of every device) wait for what runs behind. The host does not wait.

        Call it before reading or writing any state, each time: the event stays, because the next reader may be on another
        stream. While a graph is captured nothing is waited for (an event from outside must not enter it): capture begins with
        a synchronised device, as ``torch.cuda.graph`` sees to.
        """
        if not self._pending or self._backend.is_current_stream_capturing():
            return
        for pending, event in self._pending.items():
            if device is None or device == pending:
                self._backend.current_stream(pending).wait_event(event)
