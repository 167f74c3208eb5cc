"""Refreshes that overlap with the next forward pass: on a stream of their own, after the step; readers of the state wait.

A refresh (QR, v permuted, m turned) touches gram, basis, exp_avg and exp_avg_sq, which no forward or backward pass reads. So a
step may end while the refresh still runs, if

- the refresh begins after everything that the step has enqueued;
- the next step, and all other code that reads or writes the state, waits for the refresh: on the device, by event, not on the
  host;
- no memory that the refresh uses is handed out again before the refresh is done (``Tensor.record_stream``).

:class:`Overlap` keeps these three promises for any number of devices and param groups. It knows nothing of SOAP. Inside a CUDA
graph's capture the work runs in place: a graph has its own order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Overlap:
    """Runs work behind the current stream, on one side stream for each device.

    Args:
        backend: a module with ``Stream``, ``current_stream``, ``stream`` and ``is_current_stream_capturing`` as in torch.cuda;
            the tests pass a stand-in that records the calls.
    """

    def __init__(self, backend: Any = torch.cuda) -> None:
        self._backend = backend
        self._streams: dict[torch.device, Any] = {}
        self._pending: dict[torch.device, Any] = {}  # for each device the event after the work that was enqueued last

    @contextmanager
    def behind(self, device: torch.device, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Work that is enqueued on ``device`` inside runs after all work that the device's current stream holds so far. Nothing
        inside may wait for this work, and its results may be read after :meth:`wait` only.

        Args:
            tensors: all tensors that are read or written inside, without those that are allocated inside: they were allocated
                on another stream.
        """
        backend = self._backend
        if device.type != "cuda" or backend.is_current_stream_capturing():
            # after the work that still runs behind: that work may use the same tensors
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
        finally:  # work that was enqueued before an exception still runs
            for tensor in tensors:
                tensor.record_stream(side)
            self._pending[device] = side.record_event()

    def wait(self, device: torch.device | None = None) -> None:
        """Let the current stream (of ``device``, or of every device) wait for work that runs behind. The host does not wait.

        Call this every time before reading or writing any state: the event stays, because the next reader may be on another
        stream. While a graph is captured the stream waits for nothing (an event from outside must not enter the graph): a
        capture begins with a synchronised device, as ``torch.cuda.graph`` ensures.
        """
        if not self._pending or self._backend.is_current_stream_capturing():
            return
        for pending, event in self._pending.items():
            if device is None or device == pending:
                self._backend.current_stream(pending).wait_event(event)
