"""The fused step on CUDA: launch.py's tables, kernels/' launches, and what is kept of them between steps."""

from __future__ import annotations

import math
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import _ext
from .eigenbasis import Refresh, reexpress_
from .launch import MAX_NUMEL, SCALARS, STAGES, USABLE, WARPS, Launch, make_tables, padded
from .plan import Layout
from .refresh import is_due

# Plans kept for one list of parameters: lists differ while some parameters have no gradient.
MAX_PLANS = 8

# Elements of one plan, which has two float32 scratch buffers of that many: 2 GiB. Larger models are stepped piece by piece.
MAX_SCRATCH_NUMEL = 1 << 28

# How products are multiplied, by the accelerator's kind. Plain TF32 is known to ruin the basis.
# tf32x3 (three TF32 products, 21 bits of mantissa) does not compile for AMD.
PRECISION = {"cuda": "tf32x3", "hip": "ieee"}
# With precision="high" the projections may be less exact; never the Grams.
HIGH_PRECISION = {"cuda": "tf32", "hip": "ieee"}
ACCELERATOR = "hip" if torch.version.hip else "cuda"


def steps_on_device(options: dict[str, Any], param: Tensor) -> bool:
    """Whether this path serves the parameter of a group: t, the guard and found_inf are the device's business then."""
    if param.device.type != "cuda" or param.dtype == torch.float64 or options.get("foreach") is not None:
        return False
    return bool(options.get("fused")) or (options.get("fused") is None and _ext.is_default("cuda"))


def fused_on_cuda(exp_avgs: list[Tensor]) -> bool:
    """Whether one call of :func:`fused_cuda_soap` serves all of these parameters."""
    kinds = {(exp_avg.device, exp_avg.dtype) for exp_avg in exp_avgs}
    return len(kinds) == 1 and exp_avgs[0].device.type == "cuda" and exp_avgs[0].dtype == torch.float32


class Plan:
    """One step's tables on the device, its scratch, and the pointers that they were last filled with."""

    def __init__(self, layouts: list[Layout], grads: list[Tensor], params: list[Tensor], aligned: np.ndarray, normalize: bool):
        device = params[0].device
        self.aligned = aligned
        self.tables = make_tables(
            layouts,
            [str(grad.dtype).removeprefix("torch.") for grad in grads],
            [str(param.dtype).removeprefix("torch.") for param in params],
            aligned.tolist(),
            normalize,
        )
        self.tiles = torch.from_numpy(self.tables.tiles).to(device)  # [T, 4] int32
        self.problems = torch.empty(self.tables.problems.shape, dtype=torch.int64, device=device)  # [R, WIDTH]
        self.scalars = torch.zeros(len(params), SCALARS, dtype=torch.float32, device=device)  # [P, SCALARS]
        self.partials = torch.empty(max(1, self.tables.partials_numel), dtype=torch.float32, device=device)
        self.counters = torch.zeros(max(1, self.tables.counters), dtype=torch.int32, device=device)
        self.kronecker = torch.empty(max(1, self.tables.kronecker_numel), dtype=torch.float32, device=device)
        self.one = torch.ones(1, dtype=torch.float32, device=device)  # the scale when there is none
        self.scratch = _scratch(device, self.tables.scratch_numel)  # two of [scratch_numel]
        self.shared = [*(buffer.data_ptr() for buffer in self.scratch), self.kronecker.data_ptr()]
        self.pointers: np.ndarray | None = None

    def send(self, pointers: np.ndarray) -> None:
        """Fill the table of problems; nothing is sent to the device when the pointers are those of the step before."""
        if self.pointers is not None and np.array_equal(pointers, self.pointers):
            return
        self.pointers = pointers
        table = torch.from_numpy(self.tables.fill(pointers))
        if self.problems.device.type == "cuda":
            # A pinned copy of its own for every transfer: the caching host allocator keeps it until the transfer is done.
            table = table.pin_memory()
        self.problems.copy_(table, non_blocking=True)


_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()  # exp_avg of a list's first parameter -> {what the plan depends on: Plan}
_skipped: WeakIdKeyDictionary = WeakIdKeyDictionary()  # exp_avg -> [1] int32, how many gradients were not usable
_buffers: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def _scratch(device: torch.device, numel: int) -> tuple[Tensor, Tensor]:
    """Two float32 buffers of at least ``numel`` for the current stream, shared by all plans."""
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    if key not in _buffers or _buffers[key][0].numel() < numel:
        _buffers[key] = tuple(torch.empty(max(1, numel), dtype=torch.float32, device=device) for _ in range(2))
    return _buffers[key]


def scale_or_nan(grad_scale: Tensor | None, found_inf: Tensor) -> Tensor:
    """GradScaler's scale, or NaN when it found something infinite: no gradient is usable then, and none is counted."""
    scale = torch.ones_like(found_inf) if grad_scale is None else grad_scale.to(found_inf.device)
    return torch.where(found_inf.reshape(scale.shape) != 0, torch.nan, scale)


def skipped_on_device(exp_avg: Tensor | None) -> int:
    """How many of a parameter's gradients were not usable here (its ``exp_avg`` stands for it). Reads the device."""
    counter = None if exp_avg is None else _skipped.get(exp_avg)
    return 0 if counter is None else int(counter)


def _pieces(layouts: list[Layout]) -> list[list[int]]:
    """Indices of the parameters that are stepped together; one that is too large for int32 offsets alone."""
    pieces: list[list[int]] = [[]]
    numel = 0
    for i, layout in enumerate(layouts):
        if pieces[-1] and numel + layout.numel > MAX_SCRATCH_NUMEL:
            pieces.append([])
            numel = 0
        pieces[-1].append(i)
        numel += layout.numel
    return pieces


def scratch_bytes(layouts: list[Layout]) -> int:
    """Bytes of the two scratch buffers (partial sums of split Grams and Kronecker products come on top, a few percent)."""
    return max((8 * sum(padded(layouts[i].numel) for i in piece) for piece in _pieces(layouts)), default=0)


def _in_memory_order(tensor: Tensor, layout: Layout) -> Tensor:
    """The tensor itself when its memory is the layout's [D_1, ..., D_k], else an arranged copy."""
    if tensor.permute(layout.memory_order).is_contiguous():
        return tensor
    return tensor.permute(layout.memory_order).contiguous().permute(layout._memory_inverse)


def launch(kernel: Any, grid: tuple[int], *arguments: Any, **constants: Any) -> None:
    """Every launch of the fused step goes through here."""
    kernel[grid](*arguments, **constants, num_warps=WARPS[ACCELERATOR], num_stages=STAGES)


def fused_cuda_soap(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grams: list[Tensor],
    bases: list[Tensor],
    refresh_offsets: list[Tensor],
    state_steps: list[Tensor],
    layouts: list[Layout],
    grad_scale: Tensor | None,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    shampoo_beta: float,
    eps: float,
    weight_decay: float,
    precondition_frequency: int,
    normalize_grads: bool,
    correct_bias: bool,
    refresh: str,
    refresh_tolerance: float,
    maximize: bool,
    max_grad_norm: float | None = None,
    precision: str = "highest",
) -> list[int]:
    """:func:`soap_opt.functional._single_tensor_soap` for float32 state on one device, at most 1 + 2 * max_order launches.

    Models of more than MAX_SCRATCH_NUMEL elements take so many for each piece. Arguments as there. The result is empty:
    unusable gradients are counted on the device (:func:`skipped_on_device`).
    """
    from .functional import _multi_tensor_soap, by_parameter, clipping_scale  # late: functional imports this file

    pieces = _pieces(layouts)
    if len(pieces) > 1 or layouts[0].numel > MAX_NUMEL:
        if max_grad_norm is not None:
            grad_scale = clipping_scale(grads, grad_scale, max_grad_norm)
        matrices = [by_parameter(column, layouts) for column in (grams, bases, refresh_offsets)]
        options = {
            "beta1": beta1, "beta2": beta2, "shampoo_beta": shampoo_beta, "eps": eps, "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency, "normalize_grads": normalize_grads, "correct_bias": correct_bias,
            "refresh": refresh, "refresh_tolerance": refresh_tolerance, "maximize": maximize,
        }  # fmt: skip
        unusable = []
        for piece in pieces:
            part = [[each[i] for i in piece] for each in (params, grads, exp_avgs, exp_avg_sqs)]
            part += [[matrix for i in piece for matrix in each[i]] for each in matrices]
            part += [[each[i] for i in piece] for each in (state_steps, layouts)]
            if layouts[piece[0]].numel > MAX_NUMEL:
                unusable += [piece[i] for i in _multi_tensor_soap(*part, grad_scale, lr=float(lr), **options)]
            else:
                fused_cuda_soap(*part, grad_scale, lr=lr, precision=precision, **options)
        return unusable

    device = params[0].device
    # Memory that does not lie in the layout's order (merged channels_last views, slices) is stepped on in a copy.
    arranged = [
        [_in_memory_order(tensor, layout) for tensor in tensors]
        for *tensors, layout in zip(params, grads, exp_avgs, exp_avg_sqs, layouts)
    ]
    steps = [step if step.device == device else step.to(device) for step in state_steps]
    skipped = []
    for exp_avg in exp_avgs:
        if exp_avg not in _skipped:
            _skipped[exp_avg] = torch.zeros(1, dtype=torch.int32, device=device)
        skipped.append(_skipped[exp_avg])

    own = [
        [*(tensor.data_ptr() for tensor in (grad, param, m, v, step, skip))]
        for (param, grad, m, v), step, skip in zip(arranged, steps, skipped)
    ]
    matrices = [matrix.data_ptr() for matrix in (*bases, *grams)]
    plan = _plan(exp_avgs[0], layouts, [a[1] for a in arranged], params, np.asarray(own, dtype=np.int64), normalize_grads)
    plan.send(np.asarray([*(address for row in own for address in row), *matrices, *plan.shared], dtype=np.int64))

    grad_scale = plan.one if grad_scale is None else grad_scale.to(device=device, dtype=torch.float32)
    lr_scale = plan.one
    if isinstance(lr, Tensor):
        if lr.device == device:  # the kernels read it, the host need not wait
            lr_scale, lr = lr.to(torch.float32), 1.0
    # float: an integer would compile the kernels anew
    lr, weight_decay, shampoo_beta, beta1, beta2, eps = map(float, (lr, weight_decay, shampoo_beta, beta1, beta2, eps))
    log_beta1, log_beta2 = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    sums = (plan.partials, plan.counters)
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for each in plan.tables.launches:
            tables = (plan.tiles[each.first : each.first + each.count], plan.problems)
            run_launch(
                each, tables, plan.scalars, sums, (HIGH_PRECISION if precision == "high" else PRECISION)[ACCELERATOR],
                first=(grad_scale, lr_scale, lr, weight_decay, log_beta1, log_beta2, -1.0 if maximize else 1.0,
                       int(correct_bias), 0.0 if max_grad_norm is None else float(max_grad_norm), len(params)),
                adam=(beta1, beta2, eps, int(normalize_grads)), shampoo_beta=shampoo_beta,
            )  # fmt: skip

    for (param, _, m, v), *originals in zip(arranged, params, exp_avgs, exp_avg_sqs):
        for copy, original in zip((param, m, v), originals):
            if copy is not original:
                original.copy_(copy)
    for step, state_step in zip(steps, state_steps):
        if step is not state_step:
            state_step.copy_(step)
    usable = plan.scalars[:, USABLE]  # [P], 1 or 0
    gram, basis, offsets = (by_parameter(column, layouts) for column in (grams, bases, refresh_offsets))
    before = host_steps(exp_avgs, state_steps, usable)
    due = [
        (i, k)
        for i, t in enumerate(before)
        for k, offset in enumerate(offsets[i])
        if is_due(t + 1, int(offset), precondition_frequency, refresh)
    ]
    _refresh(due, usable, exp_avgs, exp_avg_sqs, gram, basis, layouts, refresh, refresh_tolerance)
    return []


def run_launch(
    each: Launch,
    tables: tuple[Tensor, Tensor],
    scalars: Tensor,
    sums: tuple[Tensor, Tensor],
    precision: str,
    *,
    first: tuple[Any, ...],
    adam: tuple[float, float, float, int],
    shampoo_beta: float,
) -> None:
    """One launch of the plan."""
    # Here and not above: importing soap_opt must work, and not wait, where there is no Triton
    import triton.language as tl

    from .kernels.gram_ema import gram_ema_kernel
    from .kernels.project import project_adam_kernel, project_apply_kernel, project_first_kernel, project_kernel

    grid = (each.count,)
    grad_dtype = getattr(tl, each.grad_dtype)
    if each.kernel == "project_first":
        launch(project_first_kernel, grid, *tables, scalars, *sums, *first, GRAD=grad_dtype, PRECISION=precision)  # fmt: skip
    elif each.kernel == "gram_ema":
        launch(gram_ema_kernel, grid, *tables, scalars, *sums, shampoo_beta, *adam, GRAD=grad_dtype,
               PRECISION=PRECISION[ACCELERATOR])  # fmt: skip
    elif each.kernel == "project_adam":
        launch(project_adam_kernel, grid, *tables, scalars, *sums, *adam, PRECISION=precision)
    elif each.kernel == "project_apply":
        launch(project_apply_kernel, grid, *tables, scalars, PRECISION=precision)
    else:
        launch(project_kernel, grid, *tables, BACK=each.kernel == "back", PRECISION=precision)


def _plan(
    owner: Tensor, layouts: list[Layout], grads: list[Tensor], params: list[Tensor], own: np.ndarray, normalize: bool
) -> Plan:
    """The kept plan for these parameters, or a new one."""
    plans = _plans.get(owner)
    if plans is None:
        plans = _plans[owner] = OrderedDict()
    key = (tuple(layouts), tuple(grad.dtype for grad in grads), tuple(param.dtype for param in params), normalize)
    # grad, param, exp_avg, exp_avg_sq: of those the kernels read vectors
    aligned = (own[:, :4] % 16 == 0).all(1)
    plan = plans.get(key)
    if plan is None or (plan.aligned & ~aligned).any():
        plan = plans[key] = Plan(layouts, grads, params, aligned, normalize)
        if len(plans) > MAX_PLANS:
            plans.popitem(last=False)
    plans.move_to_end(key)
    return plan


class _HostStep:
    """t of a parameter as the host knows it: what it was, and where to look whether the last gradient counted."""

    def __init__(self, identity: tuple[int, int], t: int) -> None:
        self.identity, self.t = identity, t
        self.last: tuple[torch.cuda.Event | None, Tensor, int] | None = None

    def before_this_step(self) -> int:
        if self.last is not None:
            event, usable, place = self.last
            if event is not None:
                event.synchronize()  # of the step before: long done when the next gradient is there
            self.t += int(usable[place])
            self.last = None
        return self.t


_host_steps: WeakIdKeyDictionary = WeakIdKeyDictionary()  # exp_avg -> _HostStep


def host_steps(exp_avgs: list[Tensor], state_steps: list[Tensor], usable: Tensor) -> list[int]:
    """t of every parameter before the step that was just launched, without waiting for it.

    Which refresh is due follows from t, and whether t moved is decided on the device. The host reads t once and then follows:
    every step's flags come back in pinned memory while the next forward pass runs. A step tensor that somebody else wrote to
    (it has another version, or is another tensor) is read again, less the step that was just launched.
    """
    event, flags = None, torch.empty(usable.shape, dtype=usable.dtype, pin_memory=usable.device.type == "cuda")
    flags.copy_(usable, non_blocking=True)
    if usable.device.type == "cuda":
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(usable.device))
    result = []
    for place, (exp_avg, step) in enumerate(zip(exp_avgs, state_steps)):
        identity = (step.data_ptr(), step._version)
        known = _host_steps.get(exp_avg)
        if known is None or known.identity != identity:
            if event is not None:
                event.synchronize()
            known = _host_steps[exp_avg] = _HostStep(identity, int(step) - int(flags[place]))
        result.append(known.before_this_step())
        known.last = (event, flags, place)
    return result


def _refresh(
    due: list[tuple[int, int]],
    usable: Tensor,
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grams: list[list[Tensor]],
    bases: list[list[Tensor]],
    layouts: list[Layout],
    refresh: str,
    refresh_tolerance: float,
) -> None:
    """Refresh the due units (parameter, position of the mode) with the multi-tensor path's functions, for now.

    A unit whose step the device skipped is refreshed to what it was; "adaptive" asks the device which units want it.
    """
    from .functional import _refresh_units

    for i, refreshed in _refresh_units(due, grams, bases, refresh, refresh_tolerance).items():
        for k, new in refreshed.items():
            counts, size = usable[i] != 0, bases[i][k].shape[0]
            refreshed[k] = Refresh(
                torch.where(counts, new.order, torch.arange(size, device=usable.device)),
                torch.where(counts, new.basis, bases[i][k]),
                torch.where(counts, new.rotation, torch.eye(size, dtype=new.rotation.dtype, device=usable.device)),
            )
        reexpress_(exp_avgs[i], exp_avg_sqs[i], bases[i], layouts[i], refreshed)
