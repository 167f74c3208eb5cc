"""The fused step on CUDA, and all that one optimizer keeps for it between steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.weak import WeakIdKeyDictionary

from .. import refresh_operator
from ..batch import Batch, Skipped
from . import launch
from .columns import USABLE
from .follow import Following, ParameterList
from .launch import on_device
from .memory import ScratchOfStreams
from .overlap import Overlap
from .plan import Call, Plan
from .refresh import Units, groupable
from .tables import PER_PARAMETER, Kinds

# Number of plans kept for one first parameter. There are several where some parameters have no gradient in some steps.
MAX_PLANS = 8


def is_recording(device: torch.device) -> bool:
    """Whether launches on this device now go into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class CudaStepper:
    """Steps the parameters of one optimizer, and owns all that is derived from them: plans, lists, scratch, t as the host knows
    it, counts of skipped steps and refreshes. A copy or a pickle of the optimizer leaves the stepper out; a new stepper derives
    everything again.

    Attributes:
        overlap: runs refreshes behind a step.
        following: the host's record of each parameter, with the counts.
        scratch: the scratch of each stream.
    """

    def __init__(self) -> None:
        self.overlap = Overlap()
        self.following = Following()
        self.scratch = ScratchOfStreams()
        # by the exp_avg of the list's first parameter, then by the kinds that a plan depends on; the latest plan last
        self._plans: MutableMapping[Tensor, OrderedDict[Kinds, Plan]] = WeakIdKeyDictionary()

    def wait(self) -> None:
        """Let the current streams wait for refreshes that run behind; the host does not wait."""
        self.overlap.wait()

    def plans(self, exp_avg: Tensor) -> list[Plan]:
        """The plans of all lists of parameters that begin with this ``exp_avg``, the latest plan last."""
        return list(self._plans.get(exp_avg, {}).values())

    def step(self, batch: Batch, grad_scale: Tensor | None, found_inf: Tensor | None = None) -> Skipped:
        """:func:`soap_opt.single_tensor._single_tensor_soap` for float32 state on one device, in at most 1 + 2 * max_order
        launches, however many param groups the parameters belong to.

        The result is empty: the device counts unusable gradients and failed refreshes (:meth:`Following.counts`). Refreshes
        come after the launches, in one call of the compiled operator. With ``overlap_refresh`` they run behind the step, and
        readers of the state wait for them first. With ``capturable`` the step also gets ready to be recorded into a CUDA graph.
        While a step is recorded nothing touches the host, and the device decides which units are due.

        Args:
            batch: as many parameters as one plan may hold (:func:`pieces_of`); the groups agree in
                :meth:`Options.agree_on_cuda`.
            grad_scale: 1-element tensor that the gradients are divided by; None for 1.
            found_inf: [1]; where it is not 0 nothing is stepped, and no gradient counts as unusable.
        """
        run = Run(self, batch)
        with run.launches(grad_scale, found_inf) as (calls, scale):
            for call in calls:
                arguments = call.arguments(scale)
                kernel, values = launch.kernel_for(call.kernel, arguments, call.constants)
                kernel[call.programs, 1, 1](*arguments, *values)
        run.refresh()
        return Skipped([], [])

    def plan_of(self, owner: Tensor, kinds: Kinds, aligned: npt.NDArray[np.bool_]) -> Plan:
        """The kept plan for the parameters whose first ``exp_avg`` is ``owner``, or a new plan."""
        plans = self._plans.get(owner)
        if plans is None:
            plans = self._plans[owner] = OrderedDict()
        plan = plans.get(kinds)
        if plan is None or (plan.aligned & ~aligned).any():
            plan = plans[kinds] = Plan(kinds, aligned, owner.device, self.scratch, self.following)
            if len(plans) > MAX_PLANS:
                plans.popitem(last=False)
        plans.move_to_end(kinds)
        return plan

    def make_ready_for_graph(
        self, plan: Plan, kinds: Kinds, aligned: npt.NDArray[np.bool_], batch: Batch, units: Units
    ) -> None:
        """Make the plan that the next capture takes: a capture can make none itself."""
        if plan.for_graph is None and refresh_operator.why_missing(plan.one.device.type) is None:
            made = Plan(kinds, aligned, plan.one.device, self.scratch, self.following)
            grouped = groupable(units, batch)
            plan.for_graph = made.reserve(grouped, batch.options[0].precision)

    def plan_of_graph(
        self, exp_avgs: list[Tensor], parameters: ParameterList, kinds: Kinds, aligned: npt.NDArray[np.bool_], precision: str
    ) -> Plan:
        """The plan that an earlier step made ready. It belongs to the graph from now on."""
        plans = self._plans.get(exp_avgs[0])
        made = None if plans is None else plans.get(kinds)
        plan = None if made is None else made.for_graph
        if made is None or plan is None or plan.precision != precision or (plan.aligned & ~aligned).any():
            raise RuntimeError(
                "a step of SOAP is recorded into a CUDA graph after a step with capturable=True that was not, with gradients "
                "for the same parameters, of the same dtypes and with the same options: make one before each capture"
            )
        made.for_graph = None
        plan.begin_capture()
        for record in parameters.followed:
            record.plans_of_graphs.append(plan)
        return plan


class Run:
    """One step: first the launches that :meth:`launches` yields, then :meth:`refresh`."""

    def __init__(self, stepper: CudaStepper, batch: Batch) -> None:
        self.stepper, self.batch = stepper, batch
        self.device = batch.params[0].device
        self.recording = is_recording(self.device)
        self.parameters = stepper.following.list_of(batch.exp_avgs, batch.layouts)
        # A tensor that does not lie in the layout's order (merged channels_last views, slices) is stepped in a copy.
        self.originals = (batch.params, batch.exp_avgs, batch.exp_avg_sqs)
        self.arranged = [self.parameters.arranged(tensors) for tensors in self.originals]
        self.grads = self.parameters.arranged(batch.grads)  # (held here: the kernels read them by address)
        self.steps = [step if step.device == self.device else step.to(self.device) for step in batch.state_steps]
        self.groups = batch.groups()
        self.plan = self._fill_plan()

    def _fill_plan(self) -> Plan:
        """The plan of this step, with a table of problems that points to this step's tensors."""
        batch, parameters, common = self.batch, self.parameters, self.batch.options[0]
        columns = (self.grads, *self.arranged)
        own = np.empty((len(batch), len(PER_PARAMETER)), dtype=np.int64)
        for place, tensors in enumerate((*columns, self.steps)):
            own[:, place] = [tensor.data_ptr() for tensor in tensors]
        own[:, -1] = parameters.skipped
        matrices = [matrix.data_ptr() for column in (batch.bases, batch.grams) for matrix in column]
        kinds = Kinds(
            tuple(batch.layouts),
            tuple(grad.dtype for grad in batch.grads),
            tuple(param.dtype for param in batch.params),
            tuple(options.normalize_grads for options, own_ in self.groups for _ in own_),
            tuple(number for number, (_, own_) in enumerate(self.groups) for _ in own_),
        )
        aligned = (own[:, : len(columns)] % 16 == 0).all(1)  # the kernels read these, Grams and bases in vectors
        aligned[parameters.owners[(np.asarray(matrices, dtype=np.int64).reshape(2, -1) % 16 != 0).any(0)]] = False
        if self.recording:
            plan = self.stepper.plan_of_graph(batch.exp_avgs, parameters, kinds, aligned, common.precision)
        else:
            plan = self.stepper.plan_of(batch.exp_avgs[0], kinds, aligned)
            if common.capturable:
                self.stepper.make_ready_for_graph(plan, kinds, aligned, batch, parameters.units)
        pointers = np.concatenate([own.reshape(-1), np.asarray([*matrices, *plan.shared()], dtype=np.int64)])
        plan.problems.send(pointers, plan.tables.fill)
        return plan

    @contextmanager
    def launches(
        self, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Iterator[tuple[list[Call], tuple[Tensor, Tensor]]]:
        """Yields the launches of steps 1 to 5, which the caller makes inside, and their grad_scale and found_inf."""
        plan, batch, device = self.plan, self.batch, self.device
        scale = plan.one if grad_scale is None else grad_scale.to(device=device, dtype=torch.float32)
        found = plan.zero if found_inf is None else found_inf.to(device=device, dtype=torch.float32)
        plan.send_options(self.groups)
        with on_device(device):
            if plan.under_way:  # an exception followed a launch: arrivals are still counted, and t may have moved
                plan.counters.zero_()
                for record in self.parameters.followed:
                    record.identity = None
            plan.under_way = True
            yield plan.calls(batch.options[0].precision), (scale, found)
        for originals, copies in ((batch.state_steps, self.steps), *zip(self.originals, self.arranged)):
            if copies is not originals:
                for original, copy in zip(originals, copies):
                    if copy is not original:
                        original.copy_(copy)
        # As torch's own in-place operators do: an autograd graph that holds such a tensor raises in its backward pass
        increment_version([*batch.params, *batch.exp_avgs, *batch.exp_avg_sqs, *batch.grams])

    def refresh(self) -> None:
        """Step 6 for the units that are due."""
        plan, batch, parameters, common = self.plan, self.batch, self.parameters, self.batch.options[0]
        phases = parameters.phases(
            batch.refresh_offsets,
            [options.precondition_frequency for options, own in self.groups for _ in own],
            [options.refresh == "together" for options, own in self.groups for _ in own],
        )
        if self.recording:
            assert plan.graph_refresh is not None  # a graph's plan has been reserved
            plan.graph_refresh.run(batch, phases, self.steps, plan.scalars, common.tolerance)
            plan.under_way = False
            return
        t = [before + 1 for before in parameters.steps_before(batch.state_steps, plan.scalars)]
        plan.under_way = False
        due = parameters.due(t, phases)
        if not due:
            return
        first = plan.refreshes.first_modes
        increment_version([batch.bases[first[i] + k] for i, k in due])
        usable, tolerance = plan.scalars[:, USABLE], common.tolerance  # [P], 1 or 0
        if refresh_operator.why_missing(self.device.type) is not None:
            plan.refreshes.run_through_torch(due, batch, usable, tolerance)  # waits for the device: cannot run behind
            return
        behind = common.overlap_refresh and not common.capturable  # (a replay of a graph waits for no event from outside)
        plan.refreshes.run_behind(behind)
        with self.stepper.overlap.behind(self.device, self._refreshed(due)) if behind else nullcontext():
            refresh = plan.refreshes.of(due, batch)
            wanted = torch.stack([usable[i] for i, _ in due]) != 0  # a stack of views is one kernel: no indices are sent
            with on_device(self.device):
                matrices = refresh.prepare(batch)
                torch.ops.soap_opt.refresh_basis_(*matrices, tolerance, wanted)
                refresh.reexpress(batch)

    def _refreshed(self, due: Units) -> list[Tensor]:
        """All tensors that a refresh reads or writes and does not allocate itself."""
        plan, batch = self.plan, self.batch
        tensors = [plan.scalars, *plan.refreshes.buffers.tensors()]
        for i in {i for i, _ in due}:
            modes = slice(*plan.refreshes.first_modes[i : i + 2])
            tensors += [batch.exp_avgs[i], batch.exp_avg_sqs[i], *batch.grams[modes], *batch.bases[modes]]
        return tensors
