"""Device memory that steps and refreshes keep: tables that the host fills, scratch, buffers of refreshes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Number = TypeVar("Number", bound=np.generic)


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy of the array on the device; the host does not wait for the transfer."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.clone()
    # Every transfer has a pinned copy of its own, which the caching host allocator keeps until the transfer is done.
    return tensor.pin_memory().to(device, non_blocking=True)


class DeviceTable:
    """A table on the device that the host fills, and the source of its present content."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> None:
        self.tensor = torch.empty(shape, dtype=dtype, device=device)
        self.source: npt.NDArray[np.generic] | None = None
        self._staging: Tensor | None = None

    def reserve(self) -> None:
        """Allocate pinned memory for one filling inside a CUDA graph's capture, which cannot. Replays read it again."""
        on_cuda = self.tensor.device.type == "cuda"
        self._staging = torch.empty(self.tensor.shape, dtype=self.tensor.dtype, device="cpu", pin_memory=on_cuda)

    def send(
        self,
        source: npt.NDArray[Number],
        make: Callable[[npt.NDArray[Number]], npt.NDArray[Number]] = lambda source: source,
    ) -> None:
        """Fill the table with make(source), unless the source equals the previous one."""
        if self.source is not None and np.array_equal(source, self.source):
            return
        self.source = None  # until the table is filled: memory may run out before
        if self._staging is None:
            self.tensor.copy_(to_device(make(source), self.tensor.device))
        else:
            self.tensor.copy_(self._staging.copy_(torch.from_numpy(make(source))), non_blocking=True)
        self.source = source


class Scratch:
    """Two float32 buffers, shared by everything on one stream; they grow on demand."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: tuple[Tensor, Tensor] | None = None

    def take(self, numel: int) -> tuple[Tensor, Tensor]:
        """Both buffers, of at least ``numel`` elements each. (Replaced buffers go back to the allocator of their stream.)"""
        if self._buffers is None or self._buffers[0].numel() < numel:
            first, second = (torch.empty(max(1, numel), dtype=torch.float32, device=self.device) for _ in range(2))
            self._buffers = first, second
        return self._buffers


class Buffers:
    """Memory that the refreshes of one plan use one after the other: as much as the largest refresh needs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[torch.dtype, Tensor] = {}
        self._identities: dict[int, Tensor] = {}

    def take(self, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """A tensor for each shape; each begins at a multiple of 16 bytes."""
        sizes = [-(-torch.Size(shape).numel() // 4) * 4 for shape in shapes]
        flat = self._flat.get(dtype)
        if flat is None or flat.numel() < sum(sizes):
            flat = self._flat[dtype] = torch.empty(sum(sizes), dtype=dtype, device=self.device)
        pieces = flat[: sum(sizes)].split(sizes)
        return [piece[: torch.Size(shape).numel()].view(shape) for piece, shape in zip(pieces, shapes)]

    def identity(self, d: int) -> Tensor:
        if d not in self._identities:
            self._identities[d] = torch.eye(d, dtype=torch.float32, device=self.device)
        return self._identities[d]

    def tensors(self) -> list[Tensor]:
        return [*self._flat.values(), *self._identities.values()]


class ScratchOfStreams:
    """The scratch of one optimizer, for each stream on which it steps or refreshes: a step may run while a refresh of the step
    before still uses scratch on another stream. The plan or the refresh that used a scratch last keeps it alive."""

    def __init__(self) -> None:
        self._kept: WeakValueDictionary[tuple[torch.device, int], Scratch] = WeakValueDictionary()

    def current(self, device: torch.device) -> Scratch:
        """The scratch of the device's current stream."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return self._kept.setdefault((device, stream), Scratch(device))

    def tensors(self) -> list[Tensor]:
        """All buffers that are kept."""
        return [buffer for scratch in self._kept.values() for buffer in scratch.take(0)]
