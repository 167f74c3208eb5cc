"""The host's records of parameters between fused steps on CUDA, by which a step of fifty tensors costs the host microseconds.

On a GPU a fused step is a handful of launches, where the original's is more than a thousand; Python that looks at every tensor
several times would take longer than either. The records keep no state alive: each one hangs on a parameter's ``exp_avg``.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import MutableMapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.weak import WeakIdKeyDictionary

from ..layout import Layout
from ..schedule import due_units
from .columns import USABLE

# Number of lists kept for one first parameter. There are several where some parameters have no gradient in some steps.
MAX_LISTS = 8


class Followed:
    """The record of one parameter: the counts on the device, and t as the host knows it."""

    def __init__(self, device: torch.device) -> None:
        self.skipped = torch.zeros(1, dtype=torch.int32, device=device)  # number of unusable gradients
        self.failed: list[Tensor] = []  # 0-d counts of failed refreshes, one for each unit of each table
        self.identity: int | None = None  # address of the step tensor when t was read; None: t was not read
        self.version = 0  # _version of the step tensor after the last step
        self.t = 0
        self.last: tuple[Flags, int] | None = None  # the flag that says whether the last gradient was usable
        self.plans_of_graphs: list[object] = []  # kept until the state or the optimizer goes

    def catch_up(self) -> int:
        """t after all steps but the one under way."""
        if self.last is not None:
            flags, place = self.last
            self.t += flags.values()[place]
            self.last = None
        return self.t


class Flags:
    """Which parameters a step has stepped, on the way to the host. All scalars [P, SCALARS] of the step travel: a single column
    would first have to be gathered by a kernel."""

    def __init__(self, scalars: Tensor) -> None:
        on_cuda = scalars.device.type == "cuda"
        self._flags = torch.empty(scalars.shape, dtype=scalars.dtype, device="cpu", pin_memory=on_cuda)
        self._flags.copy_(scalars, non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if on_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(scalars.device))
        self._values: list[int] | None = None

    def values(self) -> list[int]:
        """1 (stepped) or 0 for each parameter. Waits for the step that made the flags; the next step is the first to ask."""
        if self._values is None:
            if self._event is not None:
                self._event.synchronize()
            self._values = [int(flag) for flag in self._flags[:, USABLE].tolist()]
        return self._values


class ParameterList:
    """A list of parameters that are stepped together, identified by their ``exp_avg``s and layouts.

    Attributes:
        layouts: the layout of each parameter.
        followed: the record of each parameter.
        skipped: [P] pointers to the counts of unusable gradients.
        units: (parameter, place in its layout.modes) for every mode.
        owners: [units] the parameter of each unit.
    """

    def __init__(self, exp_avgs: Sequence[Tensor], layouts: Sequence[Layout], followed: list[Followed]) -> None:
        self._references = [weakref.ref(exp_avg) for exp_avg in exp_avgs]
        self.layouts = list(layouts)
        self.followed = followed
        self.skipped = np.asarray([record.skipped.data_ptr() for record in self.followed], dtype=np.int64)
        self._strides = [layout.memory_strides for layout in layouts]
        self.units = [(i, k) for i, layout in enumerate(layouts) for k in range(len(layout.modes))]
        self.owners = np.asarray([i for i, _ in self.units], dtype=np.int64)
        self._offset_tensors: list[Tensor] = []  # the tensors that were read, and their versions then
        self._versions: list[int] | None = None
        self._offsets = np.empty(0, dtype=np.int64)

    def holds(self, exp_avgs: Sequence[Tensor], layouts: Sequence[Layout]) -> bool:
        if len(exp_avgs) != len(self.layouts):
            return False
        alive = [reference() for reference in self._references]
        return all(map(operator.is_, alive, exp_avgs)) and all(map(operator.is_, self.layouts, layouts))

    def arranged(self, tensors: list[Tensor]) -> list[Tensor]:
        """The list itself where every tensor lies in memory as its layout's [D_1, ..., D_k], else arranged copies."""
        if [tensor.stride() for tensor in tensors] == self._strides and not any(map(Tensor.is_neg, tensors)):
            return tensors
        return [_in_memory_order(tensor, layout) for tensor, layout in zip(tensors, self.layouts)]

    def phases(
        self, refresh_offsets: list[Tensor], frequencies: Sequence[int], together: Sequence[bool]
    ) -> npt.NDArray[np.int64]:
        """[units, 2] int64: offset and frequency of every unit.

        Args:
            refresh_offsets: for every unit, 0-d int64 on the CPU. They are read once, and again after a change.
            frequencies: precondition_frequency of every parameter.
            together: for every parameter, whether its units have no offsets.
        """
        versions = [offset._version for offset in refresh_offsets]
        if versions != self._versions or not all(map(operator.is_, refresh_offsets, self._offset_tensors)):
            self._offset_tensors, self._versions = list(refresh_offsets), versions
            self._offsets = np.asarray([int(offset) for offset in refresh_offsets], dtype=np.int64)
        result = np.empty((len(self.units), 2), dtype=np.int64)
        result[:, 0] = np.where(np.asarray(together, dtype=bool)[self.owners], 0, self._offsets)
        result[:, 1] = np.asarray(frequencies, dtype=np.int64)[self.owners]
        return result

    def due(self, t: list[int], phases: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """The units that are due. t: for each parameter; phases: the result of :meth:`phases`."""
        due = due_units(np.asarray(t, dtype=np.int64)[self.owners], phases[:, 0], phases[:, 1], "staggered")
        return [self.units[unit] for unit in np.flatnonzero(due)]

    def steps_before(self, state_steps: list[Tensor], scalars: Tensor) -> list[int]:
        """t of every parameter before the step that was just launched, without waiting for that step.

        The units that are due follow from t, and the device decides whether t moves. The host reads t once and then follows it:
        the flags of every step come back in pinned memory while the next forward pass runs, and the next step reads them. So
        the host cannot run ahead of the device by more than one step. Where somebody else wrote to a step tensor (it has
        another version, or is another tensor), or a CUDA graph's replays may have moved t, the host reads t again, less the
        step that was just launched.
        """
        flags = Flags(scalars)
        result = []
        versions = [step._version for step in state_steps]
        increment_version(state_steps)  # a kernel wrote the tensors, below autograd
        identities = [step.data_ptr() for step in state_steps]
        unknown = [
            place
            for place, (record, identity, version) in enumerate(zip(self.followed, identities, versions))
            if record.identity != identity or record.version != version or record.plans_of_graphs
        ]
        for place, t in zip(unknown, _values([state_steps[place] for place in unknown])):  # waits, once
            record = self.followed[place]
            record.identity, record.last, record.t = identities[place], None, t - flags.values()[place]
        for place, (record, step) in enumerate(zip(self.followed, state_steps)):
            record.version = step._version
            result.append(record.catch_up())
            record.last = (flags, place)
        return result


def _values(steps: list[Tensor]) -> list[int]:
    """Values of 0-d tensors, in one transfer where all are on one device (in a loaded state some may be on the CPU)."""
    if len({step.device for step in steps}) != 1:
        return [int(step) for step in steps]
    return [int(t) for t in torch.stack([step.detach() for step in steps]).tolist()]


def _in_memory_order(tensor: Tensor, layout: Layout) -> Tensor:
    tensor = tensor.resolve_neg()
    if tensor.permute(layout.memory_order).is_contiguous():  # (sizes of 1 have any stride)
        return tensor
    return tensor.permute(layout.memory_order).contiguous().permute(layout._memory_inverse)


class Following:
    """The records of one optimizer's parameters that were stepped on CUDA."""

    def __init__(self) -> None:
        self._followed: MutableMapping[Tensor, Followed] = WeakIdKeyDictionary()  # by the exp_avg of a parameter
        # by the exp_avg of the list's first parameter, the latest list first
        self._lists: MutableMapping[Tensor, list[ParameterList]] = WeakIdKeyDictionary()

    def of(self, exp_avg: Tensor) -> Followed:
        """A parameter's record; its ``exp_avg`` identifies it."""
        record = self._followed.get(exp_avg)
        if record is None:
            record = self._followed[exp_avg] = Followed(exp_avg.device)
        return record

    def counts(self, exp_avg: Tensor | None) -> tuple[int, int]:
        """The numbers of unusable gradients and of failed refreshes of a parameter. Waits for the device."""
        record = None if exp_avg is None else self._followed.get(exp_avg)
        return (0, 0) if record is None else (int(record.skipped), sum(map(int, record.failed)))

    def list_of(self, exp_avgs: Sequence[Tensor], layouts: Sequence[Layout]) -> ParameterList:
        """The list of these parameters: the kept one, or a new one."""
        lists = self._lists.get(exp_avgs[0])
        if lists is None:
            lists = self._lists[exp_avgs[0]] = []
        for place, kept in enumerate(lists):
            if kept.holds(exp_avgs, layouts):
                if place > 0:
                    lists.insert(0, lists.pop(place))
                return kept
        kept = ParameterList(exp_avgs, layouts, [self.of(exp_avg) for exp_avg in exp_avgs])
        lists.insert(0, kept)
        del lists[MAX_LISTS:]
        return kept

    def release_graphs(self) -> None:
        """Forget the plans of recorded graphs, and t, which replays may have moved."""
        for record in self._followed.values():
            record.plans_of_graphs.clear()
            record.identity = None
