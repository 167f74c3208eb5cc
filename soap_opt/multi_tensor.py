"""The step in PyTorch, stage by stage over many parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .batch import Batch, Skipped
from .eigenbasis import (
    BATCH_MAX_DIM,
    Refresh,
    flush_subnormals_,
    gram_times_basis,
    is_orthogonal,
    off_diagonal_share,
    outer_products,
    project,
    project_back,
    reexpress_,
    refresh_basis,
    same_for_all_threads,
)
from .gradients import is_usable, largest_squared_norm, prepare_gradient
from .layout import Layout
from .options import Options
from .schedule import is_due
from .single_tensor import copy_finite_, step_size

# Elements of a bucket on a CPU: few enough that the elementwise passes find the results of the matrix products in cache, and
# that scratch stays small. On an accelerator all parameters are one bucket.
CPU_BUCKET_NUMEL = 1 << 19

# Tensors up to this size are stacked with others of the same layout; larger ones keep a core busy by themselves.
BATCH_MAX_NUMEL = 1 << 12

# Subnormal numbers become zeros at every 16th t: few steps meet one until then, and rounding never holds one for long.
FLUSH_PERIOD = 16


@same_for_all_threads()
def _multi_tensor_soap(batch: Batch, grad_scale: Tensor | None) -> Skipped:
    """:func:`soap_opt.single_tensor._single_tensor_soap` stage by stage over buckets of parameters: _foreach ops for everything
    elementwise, stacked products for small tensors of one layout, stacked QR for small bases. The arguments are the
    same; the parameters' options differ in lr and weight_decay at most."""
    skipped = Skipped([], [])
    lrs, o = batch.learning_rates(), batch.options[0]
    exp_avgs, exp_avg_sqs, state_steps, layouts = batch.exp_avgs, batch.exp_avg_sqs, batch.state_steps, batch.layouts
    gram, basis, offsets = (batch.by_parameter(column) for column in (batch.grams, batch.bases, batch.refresh_offsets))
    for bucket in buckets(exp_avgs, layouts):
        dtype = exp_avgs[bucket[0]].dtype
        grad = {i: prepare_gradient(batch.grads[i], dtype, grad_scale, o.maximize) for i in bucket}
        # One transfer to the host for the bucket. (Nothing is written before the host knows which gradients are usable.)
        usable = is_usable(torch.stack(torch._foreach_norm(list(grad.values())))).tolist()
        if not all(usable):
            skipped.steps.extend(i for i, ok in zip(bucket, usable) if not ok)
            bucket = [i for i, ok in zip(bucket, usable) if ok]
            if not bucket:
                continue
        stacks = stacks_of(bucket, layouts)

        # 1 project
        turned: dict[int, Tensor] = {}
        _turn(project, grad, turned, basis, layouts, stacks)
        t = {}
        for i in bucket:
            state_steps[i] += 1
            t[i] = state_steps[i].item()

        # 2 adam
        updates = _adam([exp_avgs[i] for i in bucket], [exp_avg_sqs[i] for i in bucket], [turned.pop(i) for i in bucket], o)

        # 3 project back. Orthogonal bases keep the norm, so that rms(U) = rms(U') and needs no pass after the products.
        if o.normalize_grads:
            torch._foreach_div_(updates, [u.square().mean().sqrt_().add_(1e-30) for u in updates])
        update = dict(zip(bucket, updates))
        del updates
        _turn(project_back, update, update, basis, layouts, stacks)

        # 4 apply
        sizes = [-step_size(lrs[i], t[i], o.beta1, o.beta2, o.correct_bias) for i in bucket]
        keeps = [1 - lrs[i] * batch.options[i].weight_decay for i in bucket]
        _apply([batch.params[i] for i in bucket], [update.pop(i) for i in bucket], sizes, keeps, o.eps, dtype)

        # 5 gram EMA
        _average(gram, grad, layouts, stacks, o.gram_beta)
        for i in bucket:
            if t[i] % FLUSH_PERIOD == 0:
                flush_subnormals_((exp_avgs[i], exp_avg_sqs[i], *gram[i]))

        # 6 refresh
        due = [
            (i, k)
            for i in bucket
            for k, offset in enumerate(offsets[i])
            if is_due(int(t[i]), int(offset), o.precondition_frequency, o.refresh)
        ]
        done, failed = refresh_units(due, gram, basis, o.tolerance)
        for i, refreshed in done.items():
            reexpress_(exp_avgs[i], exp_avg_sqs[i], basis[i], layouts[i], refreshed)
        skipped.refreshes.extend(failed)
    return skipped


def _turn(
    turn: Callable[[Tensor, Sequence[Tensor], Layout], Tensor],
    tensors: dict[int, Tensor],
    results: dict[int, Tensor],
    bases: list[list[Tensor]],
    layouts: list[Layout],
    stacks: list[list[int]],
) -> None:
    """Turn each parameter's tensor [*shape] into its eigenbasis, or back (turn: project, project_back), one stack at a time.
    results may be the dict ``tensors``: an input is then freed as soon as it is turned."""
    for stack in stacks:
        result = turn(_stack(tensors, stack), _stack_modes(bases, stack), layouts[stack[0]])
        results.update(_unstack(result, stack))


def _adam(exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], turned: list[Tensor], options: Options) -> list[Tensor]:
    """Step 2: update m and v in place, return m / (sqrt(v) + eps); all [*shape]. turned: the projected gradients."""
    o = options
    torch._foreach_lerp_(exp_avgs, turned, 1 - o.beta1)
    torch._foreach_mul_(exp_avg_sqs, o.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, turned, turned, 1 - o.beta2)
    del turned  # the denominators may take its memory
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(denominators, o.eps)
    updates = list(torch._foreach_div(exp_avgs, denominators))
    if o.eps < torch.finfo(updates[0].dtype).tiny:  # eps is 0, or 0 in this dtype
        for u, denominator in zip(updates, denominators):
            u.masked_fill_(denominator == 0, 0)
    return updates


def _apply(
    params: list[Tensor], updates: list[Tensor], sizes: list[float], keeps: list[float], eps: float, dtype: torch.dtype
) -> None:
    """Step 4: p <- keep (p + size U), in the state's dtype."""
    careful = may_overflow(sizes, keeps, eps, dtype)
    moved = [p.resolve_neg().to(dtype, copy=careful) for p in params]  # (_foreach takes no negative views)
    for size, places in _alike(sizes).items():  # (sizes differ where a parameter missed a gradient, or between groups)
        torch._foreach_add_([moved[k] for k in places], [updates[k] for k in places], alpha=size)
    for keep, places in _alike(keeps).items():
        if keep != 1:
            torch._foreach_mul_([moved[k] for k in places], keep)
    low = []
    for p, q in zip(params, moved):
        if careful or p.dtype == torch.float16 or p.is_neg():
            copy_finite_(p, q)
        elif p is not q:
            low.append((p, q))
    if low:
        torch._foreach_copy_([p for p, _ in low], [q for _, q in low])


def _average(
    grams: list[list[Tensor]], grads: dict[int, Tensor], layouts: list[Layout], stacks: list[list[int]], gram_beta: float
) -> None:
    """Step 5: update every Gram G_i [d_i, d_i] of a bucket in place."""
    averaged: list[Tensor] = []
    outers: list[Tensor] = []
    for stack in stacks:
        for k, outer in enumerate(outer_products(_stack(grads, stack), layouts[stack[0]])):
            averaged += [grams[i][k] for i in stack]
            outers += _unstack(outer, stack).values()
    if averaged:
        torch._foreach_lerp_(averaged, outers, 1 - gram_beta)


def may_overflow(step_sizes: Sequence[float], keeps: Sequence[float], eps: float, dtype: torch.dtype) -> bool:
    """Whether step 4 could leave the range of the state's dtype.

    It cannot where every keep is at most 1 and ||step_size U|| is lost in the rounding of the dtype's largest number.
    ||step_size U|| is at most step_size ||m|| / eps, and ||m|| is at most the norm of the largest usable gradient.
    """
    largest = largest_squared_norm(dtype) ** 0.5
    limit = torch.finfo(dtype).max * torch.finfo(dtype).eps / 8
    return max(map(abs, keeps)) > 1 or not max(map(abs, step_sizes)) * largest < limit * eps


def _alike(values: list[float]) -> dict[float, list[int]]:
    """The places at which each value stands."""
    places: dict[float, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(value, []).append(place)
    return places


def _stack(tensors: dict[int, Tensor] | list[Tensor], stack: list[int]) -> Tensor:
    """The stack's tensors as one tensor [N, *shape]; a stack of one is the tensor itself, without a copy."""
    return tensors[stack[0]] if len(stack) == 1 else torch.stack([tensors[i] for i in stack])


def _stack_modes(matrices: list[list[Tensor]], stack: list[int]) -> list[Tensor]:
    """For each mode the stack's matrices [N, d, d], or [d, d] for a stack of one."""
    return [_stack({i: matrices[i][k] for i in stack}, stack) for k in range(len(matrices[stack[0]]))]


def _unstack(tensor: Tensor, stack: list[int]) -> dict[int, Tensor]:
    return {stack[0]: tensor} if len(stack) == 1 else dict(zip(stack, tensor.unbind(0)))


def refresh_units(
    due: list[tuple[int, int]],
    grams: list[list[Tensor]],
    bases: list[list[Tensor]],
    tolerance: float,
) -> tuple[dict[int, dict[int, Refresh]], list[int]]:
    """Refresh the due units (parameter, position of the mode); small units of equal size form one stack. Returns the refreshes,
    and the parameters of the units that failed. tolerance: of the policy "adaptive", negative for the others."""
    by_size: dict[int, list[tuple[int, int]]] = {}
    for i, k in due:
        by_size.setdefault(bases[i][k].shape[0], []).append((i, k))
    result: dict[int, dict[int, Refresh]] = {}
    failed: list[int] = []
    for size, units in by_size.items():
        for chunk in [units] if size <= BATCH_MAX_DIM else [[unit] for unit in units]:
            gram = torch.stack([grams[i][k] for i, k in chunk])
            basis = torch.stack([bases[i][k] for i, k in chunk])
            product, eigenvalues = gram_times_basis(gram, basis)
            if tolerance >= 0:
                wanted = (off_diagonal_share(basis, product, eigenvalues) <= tolerance).logical_not_().tolist()
                if not any(wanted):
                    continue
                if not all(wanted):
                    chunk = [unit for unit, want in zip(chunk, wanted) if want]
                    mask = torch.tensor(wanted, device=basis.device)
                    basis, product, eigenvalues = basis[mask], product[mask], eigenvalues[mask]
            new = refresh_basis(basis, product, eigenvalues)
            for place, ((i, k), good) in enumerate(zip(chunk, is_orthogonal(new.basis).tolist())):
                if good:
                    result.setdefault(i, {})[k] = Refresh(*(part[place] for part in new))
                else:
                    failed.append(i)
    return result, failed


def buckets(exp_avgs: list[Tensor], layouts: list[Layout]) -> Iterator[list[int]]:
    """Indices of the tensors that are handled together: same device and dtype, equal layouts side by side."""
    kinds: dict[tuple[torch.device, torch.dtype], dict[Layout, list[int]]] = {}
    for i, (exp_avg, layout) in enumerate(zip(exp_avgs, layouts)):
        kinds.setdefault((exp_avg.device, exp_avg.dtype), {}).setdefault(layout, []).append(i)
    for (device, _), by_layout in kinds.items():
        limit = CPU_BUCKET_NUMEL if device.type == "cpu" else math.inf
        bucket: list[int] = []
        numel = 0
        for layout, indices in by_layout.items():
            for i in indices:
                if bucket and numel + layout.numel > limit:
                    yield bucket
                    bucket, numel = [], 0
                bucket.append(i)
                numel += layout.numel
        if bucket:
            yield bucket


def stacks_of(indices: list[int], layouts: list[Layout]) -> list[list[int]]:
    """Split a bucket: small tensors of one layout together (they are stacked), every other tensor alone."""
    small: dict[Layout, list[int]] = {}
    result: list[list[int]] = []
    for i in indices:
        if layouts[i].numel <= BATCH_MAX_NUMEL:
            small.setdefault(layouts[i], []).append(i)
        else:
            result.append([i])
    return result + list(small.values())
