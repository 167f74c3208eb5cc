"""The refresh behind a fused step on CUDA: every due basis in one call, then m and v re-expressed in a few launches."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from . import refresh_basis
from .eigenbasis import Refresh, reexpress_
from .host_side import followed
from .kernel_configs import ACCELERATOR, PRECISION
from .launch import (
    BLOCK,
    FAILED,
    KEPT,
    SCALARS,
    WIDTH,
    can_reexpress,
    launch,
    make_reexpress_tables,
    padded,
)
from .layout import KRONECKER_MAX_FACTOR, Layout
from .multi_tensor import refresh_units

if TYPE_CHECKING:
    from .fused_cuda import Plan

Units = list[tuple[int, int]]  # (parameter, place in its layout.modes), in order


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device; the host does not wait for it."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.clone()
    # A pinned copy of its own for every transfer: the caching host allocator keeps it until the transfer is done.
    return tensor.pin_memory().to(device, non_blocking=True)


class DeviceTable:
    """A table on the device that the host fills, and what it was last filled from."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> None:
        self.tensor = torch.empty(shape, dtype=dtype, device=device)
        self.source: np.ndarray | None = None
        self._staging: Tensor | None = None

    def reserve(self) -> None:
        """Pinned memory for one filling inside a CUDA graph's capture, where none can be had. Replays read it again."""
        on_cuda = self.tensor.device.type == "cuda"
        self._staging = torch.empty(self.tensor.shape, dtype=self.tensor.dtype, device="cpu", pin_memory=on_cuda)

    def send(self, source: np.ndarray, make: Callable[[np.ndarray], np.ndarray] = lambda source: source) -> None:
        """Fill it with make(source); nothing is made or sent when the source is that of the last time."""
        if self.source is not None and np.array_equal(source, self.source):
            return
        self.source = None  # until it is there: memory may run out on the way
        if self._staging is None:
            self.tensor.copy_(to_device(make(source), self.tensor.device))
        else:
            self.tensor.copy_(self._staging.copy_(torch.from_numpy(make(source))), non_blocking=True)
        self.source = source


class Scratch:
    """Two float32 buffers that everything on one stream shares; kept as long as somebody holds this object."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: tuple[Tensor, Tensor] | None = None

    def take(self, numel: int) -> tuple[Tensor, Tensor]:
        """Both buffers, of at least ``numel`` elements each. (Replaced ones go back to the allocator of their stream.)"""
        if self._buffers is None or self._buffers[0].numel() < numel:
            self._buffers = tuple(torch.empty(max(1, numel), dtype=torch.float32, device=self.device) for _ in range(2))
        return self._buffers


_scratch: WeakValueDictionary[tuple[torch.device, int], Scratch] = WeakValueDictionary()


def scratch_of_stream(device: torch.device) -> Scratch:
    """That of the current stream. The plans hold it, so that it goes with the last optimizer that used the stream."""
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    scratch = _scratch.get(key)
    if scratch is None:
        scratch = _scratch[key] = Scratch(device)
    return scratch


class Buffers:
    """Memory that the refreshes of one plan share, one after the other: as much as the largest of them needs."""

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


def kept_bytes(layouts: Sequence[Layout], offsets: Sequence[Sequence[int]], frequency: int, behind: bool) -> int:
    """Bytes that the refreshes of a group keep between steps, tables apart: what the largest phase of the period needs.

    Args:
        layouts: of the group's parameters.
        offsets: of each parameter's modes; the same everywhere for "together".
        frequency: number of phases.
        behind: refreshes run on a stream of their own, whose scratch is not that of the step.
    """
    phases: dict[int, Units] = {}
    for i, of_parameter in enumerate(offsets):
        for k, offset in enumerate(of_parameter):
            phases.setdefault(offset % frequency, []).append((i, k))

    def needed(units: Units) -> int:
        rotations_and_orders = sum(4 * d * d + 8 * d for d in (layouts[i].sizes[k] for i, k in units))
        owners = {i for i, _ in units} if behind else ()
        return rotations_and_orders + sum(8 * padded(layouts[i].numel) for i in owners)

    return max(map(needed, phases.values()), default=0)


class GroupedRefresh:
    """Tables for the refresh of one set of due units; kept, because the same units are due again a period later.

    Args:
        due: all of the units.
        layouts: of every parameter of the plan.
        grouped: parameters that the launches re-express. The others, whose state does not lie in their layout's order or has
            too many modes, are re-expressed one by one.
        aligned: of every parameter, as for :func:`soap_opt.launch.make_tables`.
        buffers: the plan's.
    """

    def __init__(self, due: Units, layouts: list[Layout], grouped: list[int], aligned: np.ndarray, buffers: Buffers) -> None:
        device = buffers.device
        self.failed = torch.zeros(len(due), dtype=torch.int32, device=device)  # how often a unit's refresh failed
        self._counting: list[weakref.ref] = []  # the exp_avgs that know of it
        self.due, self.grouped, self.buffers = due, grouped, buffers
        self.sizes = [layouts[i].sizes[k] for i, k in due]
        self.places = {unit: n for n, unit in enumerate(due)}
        self.modes = [(i, k) for i in grouped for k in range(len(layouts[i].modes))]
        self.mode_sizes = [layouts[i].sizes[k] for i, k in self.modes]
        of: dict[int, list[int]] = {i: [] for i in grouped}
        for i, k in due:
            if i in of:
                of[i].append(k)
        self.first_unit = [self.places[i, of[i][0]] for i in grouped]
        self.outcomes = torch.full((len(due),), -1, dtype=torch.int32, device=device)
        self.scratch: Scratch | None = None  # that of the stream, of the last time; a graph's own
        self.of_graph = False  # and then orders and rotations are too
        self._matrices: tuple[list[Tensor], list[Tensor]] | None = None
        self.tables = None
        if grouped:
            self.tables = make_reexpress_tables([layouts[i] for i in grouped], list(of.values()), aligned[grouped].tolist())
            self.tiles = to_device(self.tables.tiles, device)  # [T, 4] int32
            self.problems = DeviceTable(self.tables.problems.shape, device)
            self.kronecker = torch.empty(max(1, self.tables.kronecker_numel), dtype=torch.float32, device=device)

    def matrices(self) -> tuple[list[Tensor], list[Tensor]]:
        """Orders [d] int64 and rotations [d, d] of the due units."""
        if self._matrices is not None:
            return self._matrices
        orders = self.buffers.take(torch.int64, [(d,) for d in self.sizes])
        return orders, self.buffers.take(torch.float32, [(d, d) for d in self.sizes])

    def keep_for_graph(self) -> None:
        """Memory that keeps what a replay leaves in it until the next one: outside of a graph's pool, which promises that to
        nothing that was allocated inside the capture."""
        self._matrices = self.matrices()
        self.of_graph = True

    def send(self, exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], orders: list[Tensor], rotations: list[Tensor]) -> None:
        """Fill the table of problems; nothing is sent to the device when the pointers are those of the last time."""
        own = []
        for i, first in zip(self.grouped, self.first_unit):
            own += [0, 0, exp_avgs[i].data_ptr(), exp_avg_sqs[i].data_ptr(), self.outcomes[first:].data_ptr(), 0]
        turns, permutations = [], []
        for mode, size in zip(self.modes, self.mode_sizes):
            place = self.places.get(mode)
            if place is not None:
                turns.append(rotations[place].data_ptr())
                permutations.append(orders[place].data_ptr())
            else:  # read only in a Kronecker product with a mode that is due
                turns.append(self.buffers.identity(size).data_ptr() if size <= KRONECKER_MAX_FACTOR else 0)
                permutations.append(0)
        # Scratch of the stream that this runs on: behind a step, the next one may be using its own
        if not self.of_graph:
            self.scratch = scratch_of_stream(self.buffers.device)
        shared = [*(buffer.data_ptr() for buffer in self.scratch.take(self.tables.scratch_numel)), self.kronecker.data_ptr()]
        pointers = np.asarray([*own, *turns, *permutations, *shared], dtype=np.int64)
        self.problems.send(pointers, self.tables.fill)

    def prepare(self, exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Orders and rotations, and the table that points to them: all that allocates, before any basis is written."""
        orders, rotations = self.matrices()
        if self.tables is not None:
            self.send(exp_avgs, exp_avg_sqs, orders, rotations)
        self.count_for(exp_avgs)
        return orders, rotations

    def count_for(self, exp_avgs: list[Tensor]) -> None:
        """Let the parameters find what ``failed`` counts of them."""
        owners = [exp_avgs[i] for i, _ in self.due]
        if len(self._counting) == len(owners) and all(known() is x for known, x in zip(self._counting, owners)):
            return
        if self._counting:  # those were others
            self.failed = torch.zeros_like(self.failed)
        self._counting = [weakref.ref(x) for x in owners]
        for exp_avg, count in zip(owners, self.failed.unbind()):
            followed(exp_avg).failed.append(count)

    def run(
        self,
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        grams: list[list[Tensor]],
        bases: list[list[Tensor]],
        layouts: list[Layout],
        wanted: Tensor,
        tolerance: float,
    ) -> None:
        """Refresh units that are ``wanted`` ([n] bool); nothing waits for the device. Arguments as :func:`refresh_due`'s."""
        orders, rotations = self.prepare(exp_avgs, exp_avg_sqs)
        self.outcomes.fill_(-1)  # the memory of orders and rotations is shared
        of = [[matrices[i][k] for i, k in self.due] for matrices in (grams, bases)]
        refresh_basis.refresh_bases_(*of, tolerance, wanted, out=(orders, rotations, self.outcomes))
        self.reexpress(exp_avgs, exp_avg_sqs, bases, layouts)

    def reexpress(
        self, exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], bases: list[list[Tensor]], layouts: list[Layout]
    ) -> None:
        """m and v in the refreshed bases. (Orders and rotations are identities where nothing was refreshed.)"""
        self.failed.add_(self.outcomes == FAILED)
        if self.tables is not None:
            from .kernels.reexpress import reexpress_kernel  # late: importing soap_opt does not wait for Triton

            for each in self.tables.launches:
                tiles = self.tiles[each.first : each.first + each.count]
                launch(reexpress_kernel, (each.count,), tiles, self.problems.tensor, PRECISION=PRECISION[ACCELERATOR])
        alone: dict[int, dict[int, Refresh]] = {}
        for (i, k), order, rotation in zip(self.due, *self.matrices()):
            if i not in self.grouped:
                alone.setdefault(i, {})[k] = Refresh(order, bases[i][k], rotation)
        for i, results in alone.items():
            reexpress_(exp_avgs[i], exp_avg_sqs[i], bases[i], layouts[i], results)


def has_conditional_nodes() -> bool:
    """Whether what a CUDA graph's replays do only on a condition can be recorded: from CUDA 12.4 on, where PyTorch has it."""
    if not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
        return False
    if torch.version.cuda is None or not torch.cuda.is_available() or torch._C._cuda_getDriverVersion() < 12040:
        return False
    return tuple(map(int, torch.version.cuda.split(".")[:2])) >= (12, 4)


@contextmanager
def if_set(condition: Tensor) -> Iterator[None]:
    """What is recorded inside runs in those replays that find ``condition`` set (0-d bool on the device)."""
    graph = torch.cuda.CUDAGraph.get_currently_capturing_graph()
    graph.begin_capture_to_if_node(condition)
    try:
        yield
    finally:
        graph.end_capture_to_conditional_node()


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else sys.maxsize


class GraphRefresh:
    """The refresh inside a CUDA graph: every unit is in every replay, and the device decides which of them are due.

    Bases that fit in a block's shared memory are refreshed by kernels whose blocks return at once where nothing is due. Larger
    ones take ATen's calls, which are recorded into conditional nodes, one for each phase of the period; where CUDA has none,
    they are made in every replay, and their results kept when due.

    Made before the capture, which can neither allocate pinned memory nor wait; used for one. Arguments as of
    :class:`GroupedRefresh`.
    """

    def __init__(self, layouts: list[Layout], grouped: list[int], aligned: np.ndarray, buffers: Buffers) -> None:
        units = [(i, k) for i, layout in enumerate(layouts) for k in range(len(layout.modes))]
        self.refresh = GroupedRefresh(units, layouts, grouped, aligned, buffers)
        self.refresh.keep_for_graph()
        if self.refresh.tables is not None:
            self.refresh.problems.reserve()
        self.units = DeviceTable((len(units), 4), buffers.device)
        self.units.reserve()
        self.due = torch.zeros(len(units), dtype=torch.uint8, device=buffers.device)
        self.limit = sys.maxsize  # sizes above it go into conditional nodes
        if has_conditional_nodes():
            self.limit = refresh_basis.largest_in_shared_memory(shared_memory_limit(buffers.device))
        large = [n for n, d in enumerate(self.refresh.sizes) if d > self.limit]
        self._rest(large)
        # None: all of them
        self.small = [n for n, d in enumerate(self.refresh.sizes) if d <= self.limit]
        self._small_places = to_device(np.asarray(self.small, dtype=np.int64), buffers.device) if large else None
        self._load_kernels()

    def _rest(self, places: list[int]) -> None:
        """What stands where a unit is not refreshed."""
        orders, rotations = self.refresh.matrices()
        for n in places:
            torch.arange(self.refresh.sizes[n], out=orders[n], device=orders[n].device)
            rotations[n].zero_().fill_diagonal_(1.0)
            self.refresh.outcomes[n].fill_(KEPT)

    def _load_kernels(self) -> None:
        """Compile and load what the capture will launch: a capture may do neither. Nothing is due, and nothing happens."""
        from .kernels.reexpress import due_kernel, reexpress_kernel  # late: importing soap_opt does not wait for Triton

        device = self.due.device
        scalars = torch.zeros(1, SCALARS, dtype=torch.float32, device=device)
        tiles = torch.zeros(1, 4, dtype=torch.int32, device=device)
        problems = torch.zeros(1, WIDTH, dtype=torch.int64, device=device)  # of a parameter with no units
        with on_device(device):
            launch(due_kernel, (1,), self.units.tensor, scalars, self.due, 0)
            launch(reexpress_kernel, (1,), tiles, problems, PRECISION=PRECISION[ACCELERATOR])
        sizes = sorted(set(self.refresh.sizes))
        # Once more with so many that fit in shared memory as have kernels of their own
        in_shared = refresh_basis.largest_in_shared_memory(shared_memory_limit(device))
        kinds = (
            [d for d in sizes if d <= refresh_basis.WARP_LIMIT],
            [d for d in sizes if refresh_basis.WARP_LIMIT < d <= in_shared],
        )
        many = [kind[0] for kind in kinds if kind for _ in range(refresh_basis.SMALL_TABLE_ROWS + 1)]
        for chosen in (sizes, many):
            none = torch.zeros(len(chosen), dtype=torch.bool, device=device)
            matrices = [torch.eye(d, dtype=torch.float32, device=device) for d in chosen]
            refresh_basis.refresh_bases_(matrices, [matrix.clone() for matrix in matrices], due=none)
        if self._small_places is not None:  # torch's own, too
            first = torch.zeros_like(self._small_places[:1])
            outcomes = self.refresh.outcomes.index_select(0, first)
            self.refresh.outcomes.index_copy_(0, first, outcomes)
            torch.stack([self.due.view(torch.bool)[0]]).index_select(0, first).any()

    def run(
        self,
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        grams: list[list[Tensor]],
        bases: list[list[Tensor]],
        phases: np.ndarray,
        steps: list[Tensor],
        layouts: list[Layout],
        scalars: Tensor,
        tolerance: float,
    ) -> None:
        """As :func:`refresh_due`. phases: [units, 2] offset and frequency of every unit. steps, scalars: on the device."""
        refresh = self.refresh
        if not refresh.due:
            return
        from .kernels.reexpress import due_kernel  # late: importing soap_opt does not wait for Triton

        count = len(refresh.due)
        rows = np.empty((count, 4), dtype=np.int64)
        rows[:, 0] = [steps[i].data_ptr() for i, _ in refresh.due]
        rows[:, 2] = [i for i, _ in refresh.due]
        rows[:, [1, 3]] = phases
        self.units.send(rows)
        orders, rotations = refresh.prepare(exp_avgs, exp_avg_sqs)
        wanted = self.due.view(torch.bool)

        def refresh_units(places: list[int], due: Tensor, outcomes: Tensor) -> None:
            of = [[matrices[i][k] for i, k in (refresh.due[n] for n in places)] for matrices in (grams, bases)]
            out = [orders[n] for n in places], [rotations[n] for n in places], outcomes
            refresh_basis.refresh_bases_(*of, tolerance, due, out=out)

        by_phase: dict[tuple[int, int], list[int]] = {}
        for n, d in enumerate(refresh.sizes):
            if d > self.limit:
                by_phase.setdefault((int(phases[n, 0]), int(phases[n, 1])), []).append(n)
        with on_device(scalars.device):
            launch(due_kernel, (-(-count // BLOCK),), self.units.tensor, scalars, self.due, count)
            if self._small_places is None:
                refresh_units(self.small, wanted, refresh.outcomes)
            elif self.small:
                outcomes = refresh.outcomes.index_select(0, self._small_places)
                refresh_units(self.small, wanted.index_select(0, self._small_places), outcomes)
                refresh.outcomes.index_copy_(0, self._small_places, outcomes)
            # (views and one kernel each: a capture cannot send lists of indices to the device)
            of_phase = [torch.stack([wanted[n] for n in places]) for places in by_phase.values()]
            conditions = [due.any() for due in of_phase]
            for condition, due, places in zip(conditions, of_phase, by_phase.values()):
                with if_set(condition):
                    outcomes = torch.full((len(places),), -1, dtype=torch.int32, device=due.device)
                    refresh_units(places, due, outcomes)
                    for n, outcome in zip(places, outcomes.unbind()):
                        refresh.outcomes[n].copy_(outcome)
            refresh.reexpress(exp_avgs, exp_avg_sqs, bases, layouts)
            for condition, places in zip(conditions, by_phase.values()):
                with if_set(condition):
                    self._rest(places)


def on_device(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def groupable(due: Units, exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], layouts: list[Layout]) -> list[int]:
    """The parameters with due units whose m and v the launches can re-express."""

    def lies_in_order(i: int) -> bool:
        order = layouts[i].memory_order
        return all(x.permute(order).is_contiguous() for x in (exp_avgs[i], exp_avg_sqs[i]))

    return [i for i in dict.fromkeys(i for i, _ in due) if can_reexpress(layouts[i]) and lies_in_order(i)]


def refresh_due(
    plan: Plan,
    due: Units,
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grams: list[list[Tensor]],
    bases: list[list[Tensor]],
    layouts: list[Layout],
    usable: Tensor,
    tolerance: float,
) -> None:
    """Refresh the due units by the compiled operator and re-express m and v; nothing waits for the device.

    Args:
        plan: of the step; keeps the tables.
        due: units, parameter after parameter.
        exp_avgs, exp_avg_sqs, grams, bases, layouts: of every parameter of the plan, all on one device.
        usable: [P], not 0 where the parameter was stepped; nothing of the others changes.
        tolerance: with the policy "adaptive", else negative. What is passed over is known on the device only.
    """
    grouped = groupable(due, exp_avgs, exp_avg_sqs, layouts)
    key = (tuple(due), tuple(grouped))
    kept = plan.refreshes.get(key)
    if kept is None:
        if len(plan.refreshes) >= MAX_KEPT:
            plan.refreshes.clear()
        kept = plan.refreshes[key] = GroupedRefresh(due, layouts, grouped, plan.aligned, plan.buffers)
    wanted = torch.stack([usable[i] for i, _ in due]) != 0  # views and one kernel: no list of indices is sent
    with on_device(usable.device):
        kept.run(exp_avgs, exp_avg_sqs, grams, bases, layouts, wanted, tolerance)


# Sets of due units whose tables are kept for one plan: the phases of a period, and what a changed frequency makes of them.
MAX_KEPT = 256


def refresh_due_through_torch(
    due: Units,
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grams: list[list[Tensor]],
    bases: list[list[Tensor]],
    layouts: list[Layout],
    usable: Tensor,
    tolerance: float,
) -> None:
    """:func:`refresh_due` where the operator is not built: torch's QR, one size after the other, and the host waits to hear
    which units "adaptive" wants."""
    done, failed = refresh_units(due, grams, bases, tolerance)
    for i in failed:
        # (a stepped parameter's alone: a step that was skipped was not due)
        failures = followed(exp_avgs[i]).failed
        failures[:] = [sum(failures, (usable[i] != 0).to(torch.int32))]
    for i, refreshed in done.items():
        for k, new in refreshed.items():
            counts, size = usable[i] != 0, bases[i][k].shape[0]
            refreshed[k] = Refresh(
                torch.where(counts, new.order, torch.arange(size, device=usable.device)),
                torch.where(counts, new.basis, bases[i][k]),
                torch.where(counts, new.rotation, torch.eye(size, dtype=new.rotation.dtype, device=usable.device)),
            )
        reexpress_(exp_avgs[i], exp_avg_sqs[i], bases[i], layouts[i], refreshed)
