"""The refresh after a fused step: every due basis in one call, then m and v re-expressed in a few launches."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..batch import Batch
from ..eigenbasis import Refresh, reexpress_
from ..layout import KRONECKER_MAX_FACTOR, Layout
from ..multi_tensor import refresh_units
from .columns import FAILED
from .configs import ACCELERATOR, PRECISION
from .follow import Following
from .launch import launch
from .memory import Buffers, DeviceTable, Scratch, ScratchOfStreams, to_device
from .problems import padded
from .reexpress_tables import can_reexpress, make_reexpress_tables
from .tables import Tables

Units = list[tuple[int, int]]  # (parameter, index in its layout.modes), in order


def kept_bytes(layouts: Sequence[Layout], offsets: Sequence[Sequence[int]], frequency: int, behind: bool) -> int:
    """Bytes that the refreshes of a group keep between steps, without tables: the need of the largest phase of the period.

    Args:
        layouts: the layouts of the group's parameters.
        offsets: the refresh offsets of each parameter's modes; all equal for "together".
        frequency: number of phases.
        behind: whether refreshes run on a stream of their own, with scratch of its own.
    """
    phases: dict[int, Units] = {}
    for i, parameter_offsets in enumerate(offsets):
        for k, offset in enumerate(parameter_offsets):
            phases.setdefault(offset % frequency, []).append((i, k))

    def needed(units: Units) -> int:
        rotations_and_orders = sum(4 * d * d + 8 * d for d in (layouts[i].sizes[k] for i, k in units))
        owners = {i for i, _ in units} if behind else ()
        return rotations_and_orders + sum(8 * padded(layouts[i].numel) for i in owners)

    return max(map(needed, phases.values()), default=0)


class GroupedRefresh:
    """The refresh of one set of due units, with its tables. It is kept, because the same units are due again a period later.

    Args:
        plan: the refreshes of the plan, whose memory this one shares.
        due: all due units.
        grouped: the parameters that the launches re-express. Other parameters, whose state does not lie in their layout's
            order or has too many modes, are re-expressed one by one.
    """

    def __init__(self, plan: Refreshes, due: Units, grouped: list[int]) -> None:
        layouts, aligned, device = plan.layouts, plan.aligned, plan.buffers.device
        self.failed = torch.zeros(len(due), dtype=torch.int32, device=device)  # number of failed refreshes of each unit
        self._counting: list[weakref.ref[Tensor]] = []  # the exp_avgs whose records have these counts
        self.due, self.grouped, self.layouts, self.buffers = due, grouped, layouts, plan.buffers
        self.first_modes = plan.first_modes
        self.matrix_places = [self.first_modes[i] + k for i, k in due]  # indices in the lists of all Grams and bases
        self.sizes = [layouts[i].sizes[k] for i, k in due]
        self.places = {unit: n for n, unit in enumerate(due)}
        self.modes = [(i, k) for i in grouped for k in range(len(layouts[i].modes))]
        self.mode_sizes = [layouts[i].sizes[k] for i, k in self.modes]
        due_modes: dict[int, list[int]] = {i: [] for i in grouped}
        for i, k in due:
            if i in due_modes:
                due_modes[i].append(k)
        self.first_unit = [self.places[i, due_modes[i][0]] for i in grouped]
        self.outcomes = torch.full((len(due),), -1, dtype=torch.int32, device=device)
        self.own_scratch: Scratch | None = None  # in a graph, which has orders and rotations of its own too
        self.held_scratch: Scratch | None = None  # scratch of the last run, kept alive
        self._scratch, self._following = plan.scratch, plan.following
        self._matrices: tuple[list[Tensor], list[Tensor]] | None = None
        self.tables: Tables | None = None
        if grouped:
            self.tables = make_reexpress_tables(
                [layouts[i] for i in grouped], list(due_modes.values()), aligned[grouped].tolist()
            )
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
        """Allocate orders and rotations that keep their values from one replay to the next. They lie outside of the graph's
        pool, because memory that is allocated inside the capture need not keep its values."""
        self._matrices = self.matrices()

    def send(self, batch: Batch, orders: list[Tensor], rotations: list[Tensor]) -> None:
        """Fill the table of problems; nothing is sent to the device where the pointers have not changed."""
        assert self.tables is not None  # prepare checks this
        own = []
        for i, first in zip(self.grouped, self.first_unit):
            own += [batch.exp_avgs[i].data_ptr(), batch.exp_avg_sqs[i].data_ptr(), self.outcomes[first:].data_ptr()]
        turns, permutations = [], []
        for mode, size in zip(self.modes, self.mode_sizes):
            place = self.places.get(mode)
            if place is not None:
                turns.append(rotations[place].data_ptr())
                permutations.append(orders[place].data_ptr())
            else:  # read only in a Kronecker product with a due mode
                turns.append(self.buffers.identity(size).data_ptr() if size <= KRONECKER_MAX_FACTOR else 0)
                permutations.append(0)
        self.held_scratch = scratch = self.own_scratch or self._scratch.current(self.buffers.device)
        shared = [*(buffer.data_ptr() for buffer in scratch.take(self.tables.scratch_numel)), self.kronecker.data_ptr()]
        pointers = np.asarray([*own, *turns, *permutations, *shared], dtype=np.int64)
        self.problems.send(pointers, self.tables.fill)

    def prepare(self, batch: Batch) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """The arguments of soap_opt::refresh_basis_ for the due units: Grams, bases, orders, rotations and outcomes. Fills the
        table that points to them, too. All allocation happens here, before any basis is written."""
        orders, rotations = self.matrices()
        if self.tables is not None:
            self.send(batch, orders, rotations)
        self.count_for(batch.exp_avgs)
        if self._matrices is None:
            self.outcomes.fill_(-1)  # other refreshes use the same buffers: orders and rotations need not be identities
        grams, bases = ([matrices[place] for place in self.matrix_places] for matrices in (batch.grams, batch.bases))
        return grams, bases, orders, rotations, self.outcomes

    def count_for(self, exp_avgs: list[Tensor]) -> None:
        """Attach the counts of failed refreshes to the records of these parameters."""
        owners = [exp_avgs[i] for i, _ in self.due]
        if len(self._counting) == len(owners) and all(reference() is x for reference, x in zip(self._counting, owners)):
            return
        if self._counting:  # the counts so far belong to other parameters
            self.failed = torch.zeros_like(self.failed)
        self._counting = [weakref.ref(x) for x in owners]
        for exp_avg, count in zip(owners, self.failed.unbind()):
            self._following.of(exp_avg).failed.append(count)

    def reexpress(self, batch: Batch) -> None:
        """Re-express m and v in the refreshed bases. (Orders and rotations are identities where nothing was refreshed.)"""
        self.failed.add_(self.outcomes == FAILED)
        if self.tables is not None:
            from ..kernels.reexpress import reexpress_kernel  # late: importing soap_opt does not wait for Triton

            for stage in self.tables.launches:
                tiles = self.tiles[stage.first : stage.first + stage.count]
                launch(reexpress_kernel, stage.count, tiles, self.problems.tensor, PRECISION=PRECISION[ACCELERATOR])
        ungrouped: dict[int, dict[int, Refresh]] = {}
        for (i, k), place, order, rotation in zip(self.due, self.matrix_places, *self.matrices()):
            if i not in self.grouped:
                ungrouped.setdefault(i, {})[k] = Refresh(order, batch.bases[place], rotation)
        for i, results in ungrouped.items():
            own = batch.bases[self.first_modes[i] : self.first_modes[i + 1]]  # refreshed already, and copied onto themselves
            reexpress_(batch.exp_avgs[i], batch.exp_avg_sqs[i], own, self.layouts[i], results)


class Refreshes:
    """The refreshes of one plan: one for each set of units that was due, and the memory that they share.

    Args:
        layouts, aligned: for every parameter of the plan, as in :func:`soap_opt.cuda.tables.make_tables`.
        device: the parameters' device.
        scratch, following: those of the stepper; following counts failed refreshes.
    """

    # Number of sets of due units whose tables are kept: the phases of a period, and those of a frequency before a change.
    MAX_KEPT = 256

    def __init__(
        self,
        layouts: Sequence[Layout],
        aligned: npt.NDArray[np.bool_],
        device: torch.device,
        scratch: ScratchOfStreams,
        following: Following,
    ) -> None:
        self.layouts, self.aligned, self.scratch, self.following = layouts, aligned, scratch, following
        self.first_modes = list(itertools.accumulate((len(layout.modes) for layout in layouts), initial=0))
        self.buffers = Buffers(device)
        self.behind = False  # whether the kept memory was allocated on the stream behind the step
        self._kept: dict[tuple[tuple[tuple[int, int], ...], tuple[int, ...]], GroupedRefresh] = {}  # by (due, grouped)

    def run_behind(self, behind: bool) -> None:
        """Set on which stream the refreshes run from now on. Their memory belongs to the stream that it was allocated on."""
        if behind != self.behind:
            self.behind, self.buffers, self._kept = behind, Buffers(self.buffers.device), {}

    def of(self, due: Units, batch: Batch) -> GroupedRefresh:
        """The refresh of the due units, with its tables. due: parameter after parameter; batch: every parameter of the plan."""
        grouped = groupable(due, batch)
        key = (tuple(due), tuple(grouped))
        kept = self._kept.get(key)
        if kept is None:
            if len(self._kept) >= self.MAX_KEPT:
                self._kept.clear()
            kept = self._kept[key] = GroupedRefresh(self, due, grouped)
        return kept

    def run_through_torch(self, due: Units, batch: Batch, usable: Tensor, tolerance: float) -> None:
        """The refresh where the operator is not built: torch's QR, one size after the other. With "adaptive" the host waits to
        learn which units need a refresh.

        Args:
            due, batch: as of :meth:`of`.
            usable: [P], not 0 where the parameter was stepped; other parameters do not change.
            tolerance: of the policy "adaptive", else negative.
        """
        grams, bases = batch.by_parameter(batch.grams), batch.by_parameter(batch.bases)
        done, failed = refresh_units(due, grams, bases, tolerance)
        for i in failed:
            # (counted for stepped parameters only: where the step was skipped, no refresh was due)
            failures = self.following.of(batch.exp_avgs[i]).failed
            failures[:] = [sum(failures, (usable[i] != 0).to(torch.int32))]
        for i, refreshed in done.items():
            for k, new in refreshed.items():
                counts, size = usable[i] != 0, bases[i][k].shape[0]
                refreshed[k] = Refresh(
                    torch.where(counts, new.order, torch.arange(size, device=usable.device)),
                    torch.where(counts, new.basis, bases[i][k]),
                    torch.where(counts, new.rotation, torch.eye(size, dtype=new.rotation.dtype, device=usable.device)),
                )
            reexpress_(batch.exp_avgs[i], batch.exp_avg_sqs[i], bases[i], self.layouts[i], refreshed)


def groupable(due: Units, batch: Batch) -> list[int]:
    """The parameters with due units whose m and v the launches can re-express."""

    def lies_in_order(i: int) -> bool:
        order = batch.layouts[i].memory_order
        return all(x.permute(order).is_contiguous() for x in (batch.exp_avgs[i], batch.exp_avg_sqs[i]))

    return [i for i in dict.fromkeys(i for i, _ in due) if can_reexpress(batch.layouts[i]) and lies_in_order(i)]
