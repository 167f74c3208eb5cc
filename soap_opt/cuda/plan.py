"""The tables and launches of one step, for one list of parameters."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..layout import Layout
from ..options import SCRATCH_LIMIT, Options
from .columns import LR, OPTION_VALUES, OPTIONS, SCALARS
from .configs import ACCELERATOR, HIGH_PRECISION, PRECISION
from .follow import Following
from .graph import GraphRefresh
from .memory import DeviceTable, Scratch, ScratchOfStreams, to_device
from .problems import is_too_large, padded
from .refresh import Refreshes
from .tables import Kinds, make_tables


def row_of(options: Options, first: int, count: int, lr: float) -> list[float]:
    """A param group's row in the table of options. first, count: the group's parameters."""
    row = [lr, first, count, *(value(options) for value in OPTION_VALUES.values())]
    return row + [0.0] * (OPTIONS - len(row))


class Plan:
    """The tables of a step on the device, and the pointers that they were last filled with.

    Args:
        kinds: the properties of the parameters that the tables depend on.
        aligned: [P] whether all pointers of a parameter are multiples of 16 bytes.
        device: the parameters' device.
        scratch, following: those of the stepper.
    """

    def __init__(
        self,
        kinds: Kinds,
        aligned: npt.NDArray[np.bool_],
        device: torch.device,
        scratch: ScratchOfStreams,
        following: Following,
    ) -> None:
        self.aligned = aligned
        self.tables = make_tables(kinds, aligned.tolist())
        self.options = DeviceTable((1 + max(kinds.groups), OPTIONS), device, torch.float32)  # [G, OPTIONS]
        self.tiles = to_device(self.tables.tiles, device)  # [T, 4] int32
        self._calls: dict[str, list[Call]] = {}
        self.problems = DeviceTable(self.tables.problems.shape, device)  # [R, WIDTH]
        self.scalars = torch.zeros(len(kinds.layouts), SCALARS, dtype=torch.float32, device=device)  # [P, SCALARS]
        self.partials = torch.empty(max(1, self.tables.partials_numel), dtype=torch.float32, device=device)
        self.counters = torch.zeros(max(1, self.tables.counters), dtype=torch.int32, device=device)
        self.kronecker = torch.empty(max(1, self.tables.kronecker_numel), dtype=torch.float32, device=device)
        # these stand for grad_scale and found_inf that are None
        self.one, self.zero = (torch.full((1,), value, dtype=torch.float32, device=device) for value in (1.0, 0.0))
        self.scratch = scratch
        self.own_scratch: Scratch | None = None  # in a graph
        self.held_scratch: Scratch | None = None  # scratch of the last step, kept alive
        self.refreshes = Refreshes(kinds.layouts, aligned, device, scratch, following)
        self.precision = ""  # precision of the step that made the plan ready for a capture
        self.under_way = False  # whether a step has begun and not ended
        self.for_graph: Plan | None = None  # the plan that is reserved for the next capture
        self.graph_refresh: GraphRefresh | None = None

    def calls(self, precision: str) -> list[Call]:
        """The launches of a step, made once. precision: "highest" or "high"."""
        if precision not in self._calls:
            self._calls[precision] = calls_of(self, (HIGH_PRECISION if precision == "high" else PRECISION)[ACCELERATOR])
        return self._calls[precision]

    def shared(self) -> list[int]:
        """Pointers in the order of tables.SHARED."""
        self.held_scratch = self.own_scratch or self.scratch.current(self.one.device)
        return [*(buffer.data_ptr() for buffer in self.held_scratch.take(self.tables.scratch_numel)), self.kronecker.data_ptr()]

    def send_options(self, groups: list[tuple[Options, list[int]]]) -> None:
        """Send the groups' rows of options where they have changed since the last step. A kernel copies a learning rate on the
        device into its row, and every replay of a graph repeats the copy."""
        device, rows, on_device = self.one.device, [], []
        for number, (options, own) in enumerate(groups):
            lr = options.lr
            if isinstance(lr, Tensor) and lr.device == device:  # (the host need not wait for it)
                on_device.append((number, lr))
                lr = -1.0  # no learning rate is negative: a later one on the host differs, and is sent
            rows.append(row_of(options, own[0], len(own), float(lr)))
        table = np.asarray(rows, dtype=np.float32)
        self.options.send(table)
        for number, lr in on_device:
            self.options.tensor[number, LR].copy_(lr.reshape(()))

    def reserve(self, grouped: list[int], precision: str) -> Plan:
        """Get ready for a CUDA graph's capture, which can neither allocate pinned memory nor wait for the device."""
        self.precision = precision
        self.problems.reserve()
        self.options.reserve()
        self.graph_refresh = GraphRefresh(self.refreshes, grouped)
        return self

    def begin_capture(self) -> None:
        """Take scratch from the graph's own pool: replays may run on any stream, beside any other work."""
        assert self.graph_refresh is not None  # reserve made it
        self.own_scratch = self.graph_refresh.refresh.own_scratch = Scratch(self.one.device)


@lru_cache(maxsize=64)
def pieces_of(layouts: tuple[Layout, ...], limit: int) -> list[list[int]]:
    """Indices of the parameters in pieces that are stepped together. A piece has at most ``limit`` bytes of scratch, unless a
    single parameter needs more. A parameter that is too large for int32 offsets is a piece of its own."""
    pieces: list[list[int]] = [[]]
    numel = 0
    for i, layout in enumerate(layouts):
        alone = is_too_large(layout) or (pieces[-1] and is_too_large(layouts[pieces[-1][-1]]))
        if pieces[-1] and (alone or 8 * (numel + layout.numel) > limit):
            pieces.append([])
            numel = 0
        pieces[-1].append(i)
        numel += layout.numel
    return pieces


def scratch_bytes(layouts: list[Layout], limit: int = SCRATCH_LIMIT) -> int:
    """Bytes that steps keep on the device besides the state: the two scratch buffers of the largest piece, and for each
    piece its tables, the partial sums of split Grams and Kronecker products."""
    buffers, plans = 0, 0
    for piece in pieces_of(tuple(layouts), limit):
        if piece and not is_too_large(layouts[piece[0]]):
            piece_layouts = [layouts[i] for i in piece]
            plans += make_tables(Kinds.of(piece_layouts), [False] * len(piece)).nbytes
            buffers = max(buffers, 8 * sum(padded(layout.numel) for layout in piece_layouts))
    return buffers + plans


class Call(NamedTuple):
    """One launch of a plan: the parts of it that do not change from step to step."""

    kernel: Any
    programs: int
    before: tuple[Tensor, ...]  # the first arguments
    with_scale: bool  # whether grad_scale and found_inf come next
    after: tuple[Tensor, ...]  # the last arguments
    constants: dict[str, Any]

    def arguments(self, scale: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """All arguments of the launch. scale: grad_scale and found_inf."""
        return (*self.before, *(scale if self.with_scale else ()), *self.after)


def calls_of(plan: Plan, precision: str) -> list[Call]:
    """The plan's launches. precision: of the projections, in Triton's words; Grams have their own."""
    # Late: importing soap_opt must work without Triton, and must not wait for it
    import triton.language as tl

    from ..kernels.gram_ema import gram_ema_kernel
    from ..kernels.project import project_adam_kernel, project_apply_kernel, project_first_kernel, project_kernel

    calls = []
    for launch in plan.tables.launches:
        tables = (plan.tiles[launch.first : launch.first + launch.count], plan.problems.tensor)
        sums, options = (plan.scalars, plan.partials, plan.counters), (plan.options.tensor,)
        grad = {"GRAD": getattr(tl, launch.grad_dtype)}
        kernel, before, after, constants = {
            "project_first": (project_first_kernel, sums, options, {**grad, "PRECISION": precision}),
            "gram_ema": (gram_ema_kernel, sums, options, {**grad, "PRECISION": PRECISION[ACCELERATOR]}),
            "project": (project_kernel, (), (), {"BACK": False, "PRECISION": precision}),
            "back": (project_kernel, (), (), {"BACK": True, "PRECISION": precision}),
            "project_adam": (project_adam_kernel, sums, options, {"PRECISION": precision}),
            "project_apply": (project_apply_kernel, (plan.scalars,), (), {"PRECISION": precision}),
        }[launch.kernel]
        calls.append(Call(kernel, launch.count, (*tables, *before), launch.kernel == "project_first", after, constants))
    return calls
