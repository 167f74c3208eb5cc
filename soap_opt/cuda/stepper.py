"""The fused step on CUDA: its launches, and all that one optimizer keeps of them between steps."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.weak import WeakIdKeyDictionary

from .. import refresh_operator
from ..batch import Batch, Skipped
from ..layout import Layout
from ..options import SCRATCH_LIMIT, Options
from .columns import LR, OPTIONS, SCALARS, USABLE
from .configs import ACCELERATOR, HIGH_PRECISION, PRECISION
from .follow import Following, ParameterList
from .graph import GraphRefresh
from .launch import launch, on_device
from .memory import Buffers, DeviceTable, Scratch, ScratchOfStreams, to_device
from .overlap import Overlap
from .problems import is_too_large, padded
from .refresh import GroupedRefresh, RefreshKey, Units, groupable, refresh_due, refresh_due_through_torch
from .tables import PER_PARAMETER, make_tables

# Plans kept for one list of parameters: lists differ while some parameters have no gradient.
MAX_PLANS = 8


def row_of(options: Options, first: int, count: int, lr: float) -> list[float]:
    """A param group's row in the table of options, in the order of columns.LR and those after it. first, count: the group's
    parameters."""
    o = options
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in o.betas]
    return [
        lr, o.weight_decay, *logs, -1.0 if o.maximize else 1.0, o.correct_bias, o.max_grad_norm or 0.0, first, count,
        1 - o.beta1, o.beta2, 1 - o.beta2, 1 - o.gram_beta, o.eps, o.normalize_grads, 0.0,
    ]  # fmt: skip


# The key under which a plan is kept: layouts, dtypes of gradients and of parameters, normalize_grads, number of the group
PlanKey = tuple[tuple[Layout, ...], tuple[torch.dtype, ...], tuple[torch.dtype, ...], tuple[bool, ...], tuple[int, ...]]


class Plan:
    """One step's tables on the device, and the pointers that they were last filled with.

    Args:
        key: what it depends on.
        aligned: [P] whether all pointers of a parameter are multiples of 16 bytes.
        device: of the parameters.
        scratch, following: the stepper's.
    """

    def __init__(
        self,
        key: PlanKey,
        aligned: npt.NDArray[np.bool_],
        device: torch.device,
        scratch: ScratchOfStreams,
        following: Following,
    ) -> None:
        layouts, grad_dtypes, param_dtypes, normalize, groups = key
        self.layouts, self.aligned = list(layouts), aligned
        self.tables = make_tables(
            layouts,
            [str(dtype).removeprefix("torch.") for dtype in grad_dtypes],
            [str(dtype).removeprefix("torch.") for dtype in param_dtypes],
            aligned.tolist(),
            normalize,
            groups,
        )
        self.options = DeviceTable((1 + max(groups), OPTIONS), device, torch.float32)  # [G, OPTIONS]
        self.tiles = to_device(self.tables.tiles, device)  # [T, 4] int32
        self._calls: dict[str, list[Call]] = {}
        self.problems = DeviceTable(self.tables.problems.shape, device)  # [R, WIDTH]
        self.scalars = torch.zeros(len(layouts), SCALARS, dtype=torch.float32, device=device)  # [P, SCALARS]
        self.partials = torch.empty(max(1, self.tables.partials_numel), dtype=torch.float32, device=device)
        self.counters = torch.zeros(max(1, self.tables.counters), dtype=torch.int32, device=device)
        self.kronecker = torch.empty(max(1, self.tables.kronecker_numel), dtype=torch.float32, device=device)
        # defaults where grad_scale or found_inf is None
        self.one, self.zero = (torch.full((1,), value, dtype=torch.float32, device=device) for value in (1.0, 0.0))
        self.scratch, self.following = scratch, following
        self.own_scratch: Scratch | None = None  # of a graph
        self.held_scratch: Scratch | None = None  # of the last step
        self.behind = False  # whether the refreshes below were allocated on the stream behind the step
        self.buffers = Buffers(device)  # of the refreshes
        self.refreshes: dict[RefreshKey, GroupedRefresh] = {}
        self.precision = ""  # of the step that made it ready for a capture
        self.under_way = False  # a step has begun and not ended
        self.for_graph: Plan | None = None  # reserved for the next capture
        self.graph_refresh: GraphRefresh | None = None

    def calls(self, precision: str) -> list[Call]:
        """The launches, made once. precision: "highest" or "high"."""
        if precision not in self._calls:
            self._calls[precision] = calls_of(self, (HIGH_PRECISION if precision == "high" else PRECISION)[ACCELERATOR])
        return self._calls[precision]

    def shared(self) -> list[int]:
        """Pointers in the order of tables.SHARED."""
        self.held_scratch = self.own_scratch or self.scratch.current(self.one.device)
        return [*(buffer.data_ptr() for buffer in self.held_scratch.take(self.tables.scratch_numel)), self.kronecker.data_ptr()]

    def send_options(self, groups: list[tuple[Options, list[int]]]) -> None:
        """Send the groups' rows where they are others than the last time's. A learning rate on the device is copied into its
        row by a kernel, which every replay of a graph repeats."""
        device, rows, on_device = self.one.device, [], []
        for number, (options, own) in enumerate(groups):
            lr = options.lr
            if isinstance(lr, Tensor) and lr.device == device:  # the host need not wait to hear it
                on_device.append((number, lr))
                lr = -1.0  # no learning rate is negative: the next one on the host differs, and is sent
            rows.append(row_of(options, own[0], len(own), float(lr)))
        table = np.asarray(rows, dtype=np.float32)
        self.options.send(table)
        for number, lr in on_device:
            self.options.tensor[number, LR].copy_(lr.reshape(()))

    def run_behind(self, behind: bool) -> None:
        """Say on which stream the refreshes run from now on. Their memory belongs to the stream that it was allocated on."""
        if behind != self.behind:
            self.behind, self.buffers, self.refreshes = behind, Buffers(self.one.device), {}

    def reserve(self, grouped: list[int], precision: str) -> Plan:
        """Get ready for a CUDA graph's capture, in which neither pinned memory can be had nor the device be waited for."""
        self.precision = precision
        self.problems.reserve()
        self.options.reserve()
        self.graph_refresh = GraphRefresh(self.layouts, grouped, self.aligned, self.buffers, self.scratch, self.following)
        return self

    def begin_capture(self) -> None:
        """Scratch from the graph's own pool: replays run on any stream, beside anything."""
        assert self.graph_refresh is not None  # reserve made it
        self.own_scratch = self.graph_refresh.refresh.own_scratch = Scratch(self.one.device)


def is_recording(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=64)
def pieces_of(layouts: tuple[Layout, ...], limit: int) -> list[list[int]]:
    """Indices of the parameters that are stepped together, with at most ``limit`` bytes of scratch unless one alone needs
    more; one that is too large for int32 offsets alone."""
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
    """Bytes that steps keep on the device besides the state: the two scratch buffers of the largest piece, and of each piece
    its tables, the partial sums of split Grams and Kronecker products."""
    buffers, plans = 0, 0
    for piece in pieces_of(tuple(layouts), limit):
        if piece and not is_too_large(layouts[piece[0]]):
            of_piece, kinds, none = [layouts[i] for i in piece], ["float32"] * len(piece), [False] * len(piece)
            plans += make_tables(of_piece, kinds, kinds, none, none, [0] * len(piece)).nbytes
            buffers = max(buffers, 8 * sum(padded(layout.numel) for layout in of_piece))
    return buffers + plans


class Call(NamedTuple):
    """One launch of a plan, with all that does not change from step to step."""

    kernel: Any
    grid: tuple[int]
    before: tuple[Tensor, ...]  # arguments
    with_scale: bool  # whether grad_scale and found_inf come next
    after: tuple[Tensor, ...]
    constants: dict[str, Any]

    def arguments(self, scale: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """All of them. scale: grad_scale and found_inf."""
        return (*self.before, *(scale if self.with_scale else ()), *self.after)


def calls_of(plan: Plan, precision: str) -> list[Call]:
    """The plan's launches. precision: of the products that do not feed Grams, in Triton's words."""
    # Here and not above: importing soap_opt must work, and not wait, where there is no Triton
    import triton.language as tl

    from ..kernels.gram_ema import gram_ema_kernel
    from ..kernels.project import project_adam_kernel, project_apply_kernel, project_first_kernel, project_kernel

    calls = []
    for each in plan.tables.launches:
        tables = (plan.tiles[each.first : each.first + each.count], plan.problems.tensor)
        sums, options = (plan.scalars, plan.partials, plan.counters), (plan.options.tensor,)
        grad = {"GRAD": getattr(tl, each.grad_dtype)}
        kernel, before, after, constants = {
            "project_first": (project_first_kernel, sums, options, {**grad, "PRECISION": precision}),
            "gram_ema": (gram_ema_kernel, sums, options, {**grad, "PRECISION": PRECISION[ACCELERATOR]}),
            "project": (project_kernel, (), (), {"BACK": False, "PRECISION": precision}),
            "back": (project_kernel, (), (), {"BACK": True, "PRECISION": precision}),
            "project_adam": (project_adam_kernel, sums, options, {"PRECISION": precision}),
            "project_apply": (project_apply_kernel, (plan.scalars,), (), {"PRECISION": precision}),
        }[each.kernel]
        calls.append(Call(kernel, (each.count,), (*tables, *before), each.kernel == "project_first", after, constants))
    return calls


class CudaStepper:
    """Steps the parameters of one optimizer, and owns all that is derived from them on the way: plans, lists, scratch, what is
    known of t, counts of what was skipped. Dropped with the optimizer, and when it is copied or pickled; a new one finds
    everything out again.

    Attributes:
        overlap: runs refreshes behind a step.
        following: what the host knows of each parameter, and the counts.
        scratch: of each stream.
    """

    def __init__(self) -> None:
        self.overlap = Overlap()
        self.following = Following()
        self.scratch = ScratchOfStreams()
        # by the exp_avg of a list's first parameter, then by what the plan depends on; the latest last
        self._plans: MutableMapping[Tensor, OrderedDict[PlanKey, Plan]] = WeakIdKeyDictionary()

    def wait(self) -> None:
        """Let the current streams wait for refreshes that run behind; the host does not."""
        self.overlap.wait()

    def plans(self, exp_avg: Tensor) -> list[Plan]:
        """Those of the lists of parameters that begin with this one, the latest last."""
        return list(self._plans.get(exp_avg, {}).values())

    def step(self, batch: Batch, grad_scale: Tensor | None, found_inf: Tensor | None = None) -> Skipped:
        """:func:`soap_opt.single_tensor._single_tensor_soap` for float32 state on one device, in at most 1 + 2 * max_order
        launches, however many param groups the parameters belong to.

        The result is empty: unusable gradients and failed refreshes are counted on the device (:meth:`Following.counts`).
        Refreshes come after, in one call of the compiled operator; with ``overlap_refresh`` they run behind, and whoever reads
        the state waits for it first. With ``capturable`` a step is made ready for being recorded into a CUDA graph; while one
        is recorded nothing touches the host, and the device decides what is due.

        Args:
            batch: what one plan may hold (:func:`pieces_of`); the groups agree in :meth:`Options.agree_on_cuda`.
            grad_scale: 1-element tensor that the gradients are divided by; None for 1.
            found_inf: [1]; where it is not 0 nothing is stepped, and no gradient counts as unusable.
        """
        run = Run(self, batch)
        with run.launches(grad_scale, found_inf) as (calls, scale):
            for call in calls:
                launch(call.kernel, call.grid, *call.arguments(scale), **call.constants)
        run.refresh()
        return Skipped([], [])

    def plan_of(self, owner: Tensor, key: PlanKey, aligned: npt.NDArray[np.bool_]) -> Plan:
        """The kept plan for the parameters of which ``owner`` is the first exp_avg, or a new one."""
        plans = self._plans.get(owner)
        if plans is None:
            plans = self._plans[owner] = OrderedDict()
        plan = plans.get(key)
        if plan is None or (plan.aligned & ~aligned).any():
            plan = plans[key] = Plan(key, aligned, owner.device, self.scratch, self.following)
            if len(plans) > MAX_PLANS:
                plans.popitem(last=False)
        plans.move_to_end(key)
        return plan

    def make_ready_for_graph(
        self, plan: Plan, key: PlanKey, aligned: npt.NDArray[np.bool_], batch: Batch, units: Units
    ) -> None:
        """The plan that the next capture takes: a capture can make none."""
        if plan.for_graph is None and refresh_operator.why_missing(plan.one.device.type) is None:
            made = Plan(key, aligned, plan.one.device, self.scratch, self.following)
            grouped = groupable(units, batch.exp_avgs, batch.exp_avg_sqs, batch.layouts)
            plan.for_graph = made.reserve(grouped, batch.options[0].precision)

    def plan_of_graph(
        self, exp_avgs: list[Tensor], known: ParameterList, key: PlanKey, aligned: npt.NDArray[np.bool_], precision: str
    ) -> Plan:
        """The plan that an earlier step made ready, which is the graph's from now on."""
        plans = self._plans.get(exp_avgs[0])
        made = None if plans is None else plans.get(key)
        plan = None if made is None else made.for_graph
        if made is None or plan is None or plan.precision != precision or (plan.aligned & ~aligned).any():
            raise RuntimeError(
                "a step of SOAP is recorded into a CUDA graph after a step with capturable=True that was not, with gradients "
                "for the same parameters, of the same dtypes and with the same options: make one before each capture"
            )
        made.for_graph = None
        plan.begin_capture()
        for each in known.followed:
            each.plans_of_graphs.append(plan)
        return plan


class Run:
    """One step: first what :meth:`launches` yields, then :meth:`refresh`."""

    def __init__(self, stepper: CudaStepper, batch: Batch) -> None:
        self.stepper, self.batch = stepper, batch
        self.device = batch.params[0].device
        self.recording = is_recording(self.device)
        self.known = stepper.following.list_of(batch.exp_avgs, batch.layouts)
        # Memory that does not lie in the layout's order (merged channels_last views, slices) is stepped on in a copy.
        self.originals = (batch.params, batch.exp_avgs, batch.exp_avg_sqs)
        self.arranged = [self.known.arranged(tensors) for tensors in self.originals]
        self.grads = self.known.arranged(batch.grads)  # (held here: the kernels have their addresses)
        self.steps = [step if step.device == self.device else step.to(self.device) for step in batch.state_steps]
        self.groups = batch.groups()
        self.plan = self._fill_plan()

    def _fill_plan(self) -> Plan:
        """The plan of this step, its table of problems pointing to this step's tensors."""
        batch, known, common = self.batch, self.known, self.batch.options[0]
        columns = (self.grads, *self.arranged)
        own = np.empty((len(batch), len(PER_PARAMETER)), dtype=np.int64)
        for place, tensors in enumerate((*columns, self.steps)):
            own[:, place] = [tensor.data_ptr() for tensor in tensors]
        own[:, -1] = known.skipped
        matrices = [matrix.data_ptr() for column in (batch.bases, batch.grams) for matrix in column]
        key = (
            tuple(batch.layouts),
            tuple(grad.dtype for grad in batch.grads),
            tuple(param.dtype for param in batch.params),
            tuple(options.normalize_grads for options, own_ in self.groups for _ in own_),
            tuple(number for number, (_, own_) in enumerate(self.groups) for _ in own_),
        )
        aligned = (own[:, : len(columns)] % 16 == 0).all(1)  # of those the kernels read vectors, and of Grams and bases
        aligned[known.owners[(np.asarray(matrices, dtype=np.int64).reshape(2, -1) % 16 != 0).any(0)]] = False
        if self.recording:
            plan = self.stepper.plan_of_graph(batch.exp_avgs, known, key, aligned, common.precision)
        else:
            plan = self.stepper.plan_of(batch.exp_avgs[0], key, aligned)
            if common.capturable:
                self.stepper.make_ready_for_graph(plan, key, aligned, batch, known.units)
        pointers = np.concatenate([own.reshape(-1), np.asarray([*matrices, *plan.shared()], dtype=np.int64)])
        plan.problems.send(pointers, plan.tables.fill)
        return plan

    @contextmanager
    def launches(
        self, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Iterator[tuple[list[Call], tuple[Tensor, Tensor]]]:
        """The launches of steps 1 to 5, to be made inside, and grad_scale and found_inf as they take them."""
        plan, batch, device = self.plan, self.batch, self.device
        scale = plan.one if grad_scale is None else grad_scale.to(device=device, dtype=torch.float32)
        found = plan.zero if found_inf is None else found_inf.to(device=device, dtype=torch.float32)
        plan.send_options(self.groups)
        with on_device(device):
            if plan.under_way:  # an exception came after a launch: programs that arrived are still counted, t may have moved
                plan.counters.zero_()
                for each in self.known.followed:
                    each.identity = None
            plan.under_way = True
            yield plan.calls(batch.options[0].precision), (scale, found)
        for of_original, of_copy in ((batch.state_steps, self.steps), *zip(self.originals, self.arranged)):
            if of_copy is not of_original:
                for original, copy in zip(of_original, of_copy):
                    if copy is not original:
                        original.copy_(copy)
        # What torch's own in-place operators do: a graph that holds a tensor raises when it is asked for gradients
        increment_version([*batch.params, *batch.exp_avgs, *batch.exp_avg_sqs, *batch.grams])

    def refresh(self) -> None:
        """Step 6, of what is due."""
        plan, batch, known, common = self.plan, self.batch, self.known, self.batch.options[0]
        exp_avgs, exp_avg_sqs, layouts = batch.exp_avgs, batch.exp_avg_sqs, batch.layouts
        phases = known.phases(
            batch.refresh_offsets,
            [options.precondition_frequency for options, own in self.groups for _ in own],
            [options.refresh == "together" for options, own in self.groups for _ in own],
        )
        if self.recording:
            grams, bases = batch.by_parameter(batch.grams), batch.by_parameter(batch.bases)
            assert plan.graph_refresh is not None  # a graph's plan was reserved
            plan.graph_refresh.run(
                exp_avgs, exp_avg_sqs, grams, bases, phases, self.steps, layouts, plan.scalars, common.tolerance
            )
            plan.under_way = False
            return
        t = [before + 1 for before in known.steps_before(batch.state_steps, plan.scalars)]
        plan.under_way = False
        due = known.due(t, phases)
        if not due:
            return
        grams, bases = batch.by_parameter(batch.grams), batch.by_parameter(batch.bases)
        increment_version([bases[i][k] for i, k in due])
        usable = plan.scalars[:, USABLE]  # [P], 1 or 0
        state = (due, exp_avgs, exp_avg_sqs, grams, bases, layouts, usable, common.tolerance)
        if refresh_operator.why_missing(self.device.type) is not None:
            # It waits for the device: nothing that could run behind
            refresh_due_through_torch(*state, self.stepper.following)
        elif not common.overlap_refresh or common.capturable:  # (a graph's replay does not wait for an event from outside)
            plan.run_behind(False)
            refresh_due(plan, *state)
        else:
            plan.run_behind(True)
            owners = {i for i, _ in due}
            touched = [plan.scalars, *plan.buffers.tensors()]
            touched += [x for i in owners for x in (exp_avgs[i], exp_avg_sqs[i], *grams[i], *bases[i])]
            self.stepper.overlap.behind(self.device, partial(refresh_due, plan, *state), touched)
