"""The refresh inside a CUDA graph, where the device decides what is due."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import refresh_operator
from ..batch import Batch
from .columns import BLOCK, KEPT, SCALARS, WIDTH
from .configs import ACCELERATOR, PRECISION
from .launch import launch, on_device
from .memory import DeviceTable, to_device
from .refresh import GroupedRefresh, Refreshes


def has_conditional_nodes() -> bool:
    """Whether a CUDA graph can record work that its replays do on a condition: from CUDA 12.4 on, where PyTorch supports it."""
    if not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
        return False
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False
    if torch._C._cuda_getDriverVersion() < 12040:  # type: ignore[attr-defined]  # missing in torch's stubs
        return False
    return tuple(map(int, torch.version.cuda.split(".")[:2])) >= (12, 4)


@contextmanager
def if_set(condition: Tensor) -> Iterator[None]:
    """The work that is recorded inside runs in the replays that find ``condition`` set (0-d bool on the device)."""
    graph = torch.cuda.CUDAGraph.get_currently_capturing_graph()
    graph.begin_capture_to_if_node(condition)
    try:
        yield
    finally:
        graph.end_capture_to_conditional_node()


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on this device."""
    if device.type != "cuda":
        return sys.maxsize
    properties = torch.cuda.get_device_properties(device)
    limit: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # missing in torch's stubs
    return limit


class GraphRefresh:
    """The refresh inside a CUDA graph: every unit is in every replay, and the device decides which of them are due.

    Kernels refresh the bases that fit in a block's shared memory; their blocks return at once where nothing is due. Larger
    bases take ATen's calls, which are recorded into conditional nodes, one for each phase of the period. Where CUDA has no such
    nodes, every replay makes the calls, and their results are kept when due.

    The object is made before the capture, which can neither allocate pinned memory nor wait. It serves one capture. Arguments
    as of :class:`GroupedRefresh`.
    """

    def __init__(self, plan: Refreshes, grouped: list[int]) -> None:
        units = [(i, k) for i, layout in enumerate(plan.layouts) for k in range(len(layout.modes))]
        device = plan.buffers.device
        self.refresh = GroupedRefresh(plan, units, grouped)
        self.refresh.keep_for_graph()
        if self.refresh.tables is not None:
            self.refresh.problems.reserve()
        self.units = DeviceTable((len(units), 4), device)
        self.units.reserve()
        self.due = torch.zeros(len(units), dtype=torch.uint8, device=device)
        self.limit = sys.maxsize  # larger bases go into conditional nodes
        if has_conditional_nodes():
            self.limit = refresh_operator.largest_in_shared_memory(shared_memory_limit(device))
        large = [n for n, d in enumerate(self.refresh.sizes) if d > self.limit]
        self._rest(large)
        # _small_places is None where every unit is small
        self.small = [n for n, d in enumerate(self.refresh.sizes) if d <= self.limit]
        self._small_places = to_device(np.asarray(self.small, dtype=np.int64), device) if large else None
        self._load_kernels()

    def _rest(self, places: list[int]) -> None:
        """Set units to "not refreshed": identities as order and rotation, outcome KEPT."""
        orders, rotations = self.refresh.matrices()
        for n in places:
            torch.arange(self.refresh.sizes[n], out=orders[n], device=orders[n].device)
            rotations[n].zero_().fill_diagonal_(1.0)
            self.refresh.outcomes[n].fill_(KEPT)

    def _load_kernels(self) -> None:
        """Compile and load the kernels that the capture will launch: a capture may do neither. Nothing is due here."""
        from ..kernels.reexpress import due_kernel, reexpress_kernel  # late: importing soap_opt does not wait for Triton

        device = self.due.device
        scalars = torch.zeros(1, SCALARS, dtype=torch.float32, device=device)
        tiles = torch.zeros(1, 4, dtype=torch.int32, device=device)
        problems = torch.zeros(1, WIDTH, dtype=torch.int64, device=device)  # of a parameter with no units
        with on_device(device):
            launch(due_kernel, 1, self.units.tensor, scalars, self.due, 0)
            launch(reexpress_kernel, 1, tiles, problems, PRECISION=PRECISION[ACCELERATOR])
        sizes = sorted(set(self.refresh.sizes))
        # Once more with so many matrices in shared memory that the kernels of large tables run
        in_shared = refresh_operator.largest_in_shared_memory(shared_memory_limit(device))
        kinds = (
            [d for d in sizes if d <= refresh_operator.WARP_LIMIT],
            [d for d in sizes if refresh_operator.WARP_LIMIT < d <= in_shared],
        )
        many = [kind[0] for kind in kinds if kind for _ in range(refresh_operator.SMALL_TABLE_ROWS + 1)]
        for chosen in (sizes, many):
            none = torch.zeros(len(chosen), dtype=torch.bool, device=device)
            matrices = [torch.eye(d, dtype=torch.float32, device=device) for d in chosen]
            refresh_operator.refresh_bases_(matrices, [matrix.clone() for matrix in matrices], due=none)
        if self._small_places is not None:  # torch's kernels, too
            first = torch.zeros_like(self._small_places[:1])
            outcomes = self.refresh.outcomes.index_select(0, first)
            self.refresh.outcomes.index_copy_(0, first, outcomes)
            torch.stack([self.due.view(torch.bool)[0]]).index_select(0, first).any()

    def run(self, batch: Batch, phases: npt.NDArray[np.int64], steps: list[Tensor], scalars: Tensor, tolerance: float) -> None:
        """Refresh the units that are due when this runs or is replayed, and re-express m and v.

        Args:
            phases: [units, 2] offset and frequency of every unit.
            steps, scalars: t of every parameter, and the scalars [P, SCALARS] of the step, on the device.
        """
        refresh = self.refresh
        if not refresh.due:
            return
        from ..kernels.reexpress import due_kernel  # late: importing soap_opt does not wait for Triton

        count = len(refresh.due)
        rows = np.empty((count, 4), dtype=np.int64)
        rows[:, 0] = [steps[i].data_ptr() for i, _ in refresh.due]
        rows[:, 2] = [i for i, _ in refresh.due]
        rows[:, [1, 3]] = phases
        self.units.send(rows)
        grams, bases, orders, rotations, outcomes = refresh.prepare(batch)
        wanted = self.due.view(torch.bool)

        def refresh_units(places: list[int], due: Tensor, outcomes: Tensor) -> None:
            matrices = ([column[n] for n in places] for column in (grams, bases, orders, rotations))
            torch.ops.soap_opt.refresh_basis_(*matrices, outcomes, tolerance, due)

        by_phase: dict[tuple[int, int], list[int]] = {}
        for n, d in enumerate(refresh.sizes):
            if d > self.limit:
                by_phase.setdefault((int(phases[n, 0]), int(phases[n, 1])), []).append(n)
        with on_device(scalars.device):
            launch(due_kernel, -(-count // BLOCK), self.units.tensor, scalars, self.due, count)
            if self._small_places is None:
                refresh_units(self.small, wanted, outcomes)
            elif self.small:
                own = outcomes.index_select(0, self._small_places)
                refresh_units(self.small, wanted.index_select(0, self._small_places), own)
                outcomes.index_copy_(0, self._small_places, own)
            # (a stack of views is one kernel; indexing would send a list of indices to the device, which a capture cannot)
            due_by_phase = [torch.stack([wanted[n] for n in places]) for places in by_phase.values()]
            conditions = [due.any() for due in due_by_phase]
            for condition, due, places in zip(conditions, due_by_phase, by_phase.values()):
                with if_set(condition):
                    own = torch.full((len(places),), -1, dtype=torch.int32, device=due.device)
                    refresh_units(places, due, own)
                    for n, outcome in zip(places, own.unbind()):
                        outcomes[n].copy_(outcome)
            refresh.reexpress(batch)
            for condition, places in zip(conditions, by_phase.values()):
                with if_set(condition):
                    self._rest(places)
