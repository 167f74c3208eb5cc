"""SOAP's step as functions of lists of tensors: the chooser :func:`soap` and its implementations.

:func:`_single_tensor_soap` is the specification. Every other implementation takes the same arguments, does the same to
the same state, and is tested against it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ext
from .checkpoint import state_dtype
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
from .fused_cuda import SCRATCH_LIMIT, GroupOptions, fused_cuda_soap
from .overlap import Overlap
from .plan import Layout, batches, buckets, layout_table, scratch
from .refresh import is_due
from .skipped import Skipped

# _multi_tensor_soap makes zeros of subnormal numbers at every 16th t: until then few steps meet them, and they are never held.
FLUSH_PERIOD = 16


def soap(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grams: list[Tensor],
    bases: list[Tensor],
    refresh_offsets: list[Tensor],
    state_steps: list[Tensor],
    layouts: list[Layout],
    foreach: bool | None = None,
    fused: bool | None = None,
    grad_scale: Tensor | None = None,
    *,
    lr: float | Tensor | list[float],
    beta1: float,
    beta2: float,
    shampoo_beta: float,
    eps: float,
    weight_decay: float | list[float],
    precondition_frequency: int,
    normalize_grads: bool,
    correct_bias: bool,
    refresh: str,
    refresh_tolerance: float,
    maximize: bool,
    max_grad_norm: float | None = None,
    found_inf: Tensor | None = None,
    precision: str = "highest",
    overlap: Overlap | None = None,
    capturable: bool = False,
    scratch_limit: int = SCRATCH_LIMIT,
) -> Skipped:
    """One steady step (steps 1 to 6 of :class:`soap_opt.SOAP`) for parameters that are initialised.

    Lists run over parameters; those of matrices run over the preconditioned modes, parameter after parameter. d_i are the
    sizes of a parameter's preconditioned modes, ``layouts[p].sizes``.

    Args:
        params: updated in place.
        grads: same shapes; never written.
        exp_avgs, exp_avg_sqs: m and v in the eigenbasis, the parameter's shape, float32 (float64 for float64).
        grams, bases: G_i and Q_i, [d_i, d_i].
        refresh_offsets: of each mode, 0-d int64 tensors on the CPU.
        state_steps: t, 0-d float32 tensors.
        layouts: how each parameter's modes lie.
        foreach, fused: which implementation; both None picks the fastest that works.
        grad_scale: 1-element tensor that the gradients are divided by; None for 1.
        lr, weight_decay: also a list with one for each parameter, but on the fused CUDA and the single-tensor path.
        max_grad_norm: clip the norm of all gradients together, as ``clip_grad_norm_`` before the step would.
        found_inf: [1]; where it is not 0 nothing is stepped, and no gradient counts as unusable (fused CUDA path alone;
            elsewhere the caller looks).
        precision: "high" allows TF32 in the fused CUDA path's projections; the other paths are always at "highest".
        overlap: what runs the fused CUDA path's refreshes behind the step; None, and the other paths, in place.
        capturable: get ready for a CUDA graph (fused CUDA path).
        scratch_limit: bytes of scratch from which on a model is stepped piece by piece (fused CUDA path).

    Returns:
        Indices of the parameters that were not stepped, and of those with a basis that was due and could not be refreshed. (The
        fused CUDA path counts both on the device.)
    """
    options: dict[str, Any] = {
        "beta1": beta1, "beta2": beta2, "shampoo_beta": shampoo_beta, "eps": eps, "weight_decay": weight_decay,
        "precondition_frequency": precondition_frequency, "normalize_grads": normalize_grads, "correct_bias": correct_bias,
        "refresh": refresh, "refresh_tolerance": refresh_tolerance, "maximize": maximize,
    }  # fmt: skip
    state = (exp_avgs, exp_avg_sqs, grams, bases, refresh_offsets, state_steps, layouts)
    fused = use_fused(params, foreach, fused)
    # Triton's first launch has every norm of one device and dtype; across several, and elsewhere, they are a pass of their own
    if max_grad_norm is not None and not (fused and runs_triton(exp_avgs[0]) and len(alike(exp_avgs)) == 1):
        grad_scale = clipping_scale(grads, grad_scale, max_grad_norm)
        max_grad_norm = None
    if fused:
        extras = {
            "found_inf": found_inf, "precision": precision, "overlap": overlap, "capturable": capturable,
            "scratch_limit": scratch_limit,
        }  # fmt: skip
        return _fused_soap(params, grads, *state, grad_scale, lr=lr, max_grad_norm=max_grad_norm, triton=extras, **options)
    function = _multi_tensor_soap if foreach is None or foreach else _single_tensor_soap
    with same_for_all_threads():
        return function(params, grads, *state, grad_scale, lr=lr if isinstance(lr, list) else float(lr), **options)


def runs_triton(exp_avg: Tensor) -> bool:
    """Whether the Triton kernels step a parameter with this state. float64 has no tensor cores to gain from, and rarely a
    model: the multi-tensor path serves it."""
    return exp_avg.device.type == "cuda" and exp_avg.dtype == torch.float32


def alike(exp_avgs: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """Indices of the parameters of each device and dtype of state."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, exp_avg in enumerate(exp_avgs):
        kinds.setdefault((exp_avg.device, exp_avg.dtype), []).append(i)
    return kinds


def clipping_scale(grads: list[Tensor], grad_scale: Tensor | None, max_grad_norm: float) -> Tensor:
    """The scale that divides gradients as ``clip_grad_norm_(params, max_grad_norm)`` would clip them, [1].

    A gradient that is not usable has no part in the total norm: its parameter stays as it is and the others move on.
    """
    device, dtype = grads[0].device, state_dtype(grads[0])
    with same_for_all_threads():
        norms = torch.stack([torch.linalg.vector_norm(grad, dtype=state_dtype(grad)).to(device, dtype) for grad in grads])
    scale = norms.new_ones(1) if grad_scale is None else grad_scale.to(device, dtype).reshape(1)
    norms = norms / scale
    total = torch.linalg.vector_norm(torch.where(is_usable(norms), norms, 0))
    return scale / (max_grad_norm / (total + 1e-6)).clamp(max=1.0)


def use_fused(tensors: list[Tensor], foreach: bool | None, fused: bool | None) -> bool:
    """Whether the package's own kernels run: where asked for, and by default where they all exist."""
    if fused is None and foreach is None:
        return all(_ext.is_default(device_type) for device_type in {t.device.type for t in tensors})
    return bool(fused)


def all_on_cpu(tensors: list[Tensor]) -> bool:
    """Whether the compiled CPU operators serve all of these: first gradients have no kernels of their own on CUDA."""
    return all(tensor.device.type == "cpu" for tensor in tensors)


def first_grams(
    grads: list[Tensor],
    layouts: list[Layout],
    dtype: torch.dtype,
    foreach: bool | None,
    fused: bool | None,
    grad_scale: Tensor | None,
    shampoo_beta: float,
) -> list[tuple[list[Tensor] | None, bool]]:
    """Of each first gradient the Grams, (1 - shampoo_beta) times it contracted with itself, [d_i, d_i] for every mode (None
    where the gradient is not usable, see :func:`is_usable`), and whether anything in it is not zero.

    Args:
        grads: of any dtype; never written.
        layouts: how each one's modes lie.
        dtype: of the state.
        foreach, fused, grad_scale: as in :func:`soap`.
        shampoo_beta: decay rate of the Grams.
    """
    if use_fused(grads, foreach, fused) and all_on_cpu(grads):
        grams = [
            [torch.zeros(d, d, dtype=dtype, device=grad.device) for d in layout.sizes] for grad, layout in zip(grads, layouts)
        ]
        kinds = tuple(layouts)
        squared_norms = torch.ops.soap_opt.gram_ema_(
            grads, [g for gram in grams for g in gram], layout_table(kinds), scratch(kinds, dtype), grad_scale, shampoo_beta
        ).tolist()
        limit = largest_squared_norm(dtype)
        return [(gram if norm <= limit else None, norm > 0) for gram, norm in zip(grams, squared_norms)]
    result: list[tuple[list[Tensor] | None, bool]] = []
    for grad, layout in zip(grads, layouts):
        grad = prepare_gradient(grad, dtype, grad_scale, maximize=False)
        if is_usable(torch.linalg.vector_norm(grad)):
            with same_for_all_threads():
                outers = [(outer * (1 - shampoo_beta)).contiguous() for outer in outer_products(grad, layout)]
            result.append((outers, bool((grad.abs() >= torch.finfo(dtype).tiny).any())))
        else:
            result.append((None, True))
    return result


def by_parameter(matrices: list[Tensor], layouts: list[Layout]) -> list[list[Tensor]]:
    """A flat list over modes as one list for each parameter."""
    rest = iter(matrices)
    return [list(itertools.islice(rest, len(layout.modes))) for layout in layouts]


def prepare_gradient(grad: Tensor, dtype: torch.dtype, grad_scale: Tensor | None, maximize: bool) -> Tensor:
    """The gradient of what is minimised, in the state's dtype, GradScaler's scale divided out; never p.grad's own memory
    when anything was changed."""
    grad = grad.to(dtype)
    if grad_scale is not None:
        grad = grad / grad_scale.to(device=grad.device, dtype=dtype).reshape(())  # [1] would make a 0-d gradient [1]
    return -grad if maximize else grad


def is_usable(norm: Tensor) -> Tensor:
    """Whether ||G||_F^2 is at most :func:`largest_squared_norm`, which bounds every entry of G in any basis, of its Grams and
    of v. Takes ||G||_F."""
    return norm.square() <= largest_squared_norm(norm.dtype)  # false for NaN


def largest_squared_norm(dtype: torch.dtype) -> float:
    """A quarter of the type's largest number: room for rounding."""
    return torch.finfo(dtype).max / 4


def step_size(lr: float, t: float, beta1: float, beta2: float, correct_bias: bool) -> float:
    """lr * c with c = sqrt(1 - b2^t) / (1 - b1^t), or 1 without bias correction."""
    return lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t) if correct_bias else lr


def _single_tensor_soap(
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
    lr: float,
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
) -> Skipped:
    """The specification: one parameter after the other, step by step. Arguments and result as in :func:`soap`."""
    skipped = Skipped([], [])
    matrices = (by_parameter(column, layouts) for column in (grams, bases, refresh_offsets))
    for i, (param, gram, basis, offsets) in enumerate(zip(params, *matrices)):
        m, v, layout = exp_avgs[i], exp_avg_sqs[i], layouts[i]
        grad = prepare_gradient(grads[i], m.dtype, grad_scale, maximize)
        if not is_usable(torch.linalg.vector_norm(grad)):
            skipped.steps.append(i)
            continue

        # 1 project:  G' = G x_1 Q_1 ... x_k Q_k;  t <- t + 1
        projected = project(grad, basis, layout)
        state_steps[i] += 1
        t = state_steps[i].item()

        # 2 adam:  m <- b1 m + (1 - b1) G';  v <- b2 v + (1 - b2) G'^2;  U' = m / (sqrt(v) + eps), 0 for a division by 0
        m.lerp_(projected, 1 - beta1)
        v.mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
        flush_subnormals_((m, v))
        denominator = v.sqrt().add_(eps)
        update = torch.where(denominator > 0, m / denominator, 0)

        # 3 project back:  U = U' x_1 Q_1^T ... x_k Q_k^T
        update = project_back(update, basis, layout)
        if normalize_grads:
            update = update / (1e-30 + update.square().mean().sqrt())

        # 4 apply:  p <- p - lr c U;  p <- p (1 - lr weight_decay).  In the state's dtype: a bfloat16 p is rounded once.
        moved = param.to(m.dtype).sub(update, alpha=step_size(lr, t, beta1, beta2, correct_bias))
        if weight_decay != 0:
            moved.mul_(1 - lr * weight_decay)
        copy_finite_(param, moved)

        # 5 gram EMA:  G_i <- beta_s G_i + (1 - beta_s) (G contracted with itself over all modes but i)
        for g, outer in zip(gram, outer_products(grad, layout)):
            g.lerp_(outer, 1 - shampoo_beta)
        flush_subnormals_(gram)

        # 6 refresh:  P = G_i Q_i;  e = diag(Q_i^T P);  Q_i' = qr(P, columns by falling e).Q;  v permuted, m turned
        refreshed: dict[int, Refresh] = {}
        for k, (g, q) in enumerate(zip(gram, basis)):
            if is_due(int(t), int(offsets[k]), precondition_frequency, refresh):
                product, eigenvalues = gram_times_basis(g, q)
                # (a share that is not a number is no reason to keep the basis: the refresh fails, and is counted)
                if refresh != "adaptive" or not off_diagonal_share(q, product, eigenvalues) <= refresh_tolerance:
                    new = refresh_basis(q, product, eigenvalues)
                    if is_orthogonal(new.basis):
                        refreshed[k] = new
                    else:
                        skipped.refreshes.append(i)
        if refreshed:
            reexpress_(m, v, basis, layout, refreshed)
    return skipped


def _multi_tensor_soap(
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
    lr: float | list[float],
    beta1: float,
    beta2: float,
    shampoo_beta: float,
    eps: float,
    weight_decay: float | list[float],
    precondition_frequency: int,
    normalize_grads: bool,
    correct_bias: bool,
    refresh: str,
    refresh_tolerance: float,
    maximize: bool,
) -> Skipped:
    """:func:`_single_tensor_soap` stage by stage over buckets of parameters: _foreach ops for everything elementwise,
    batched products for small tensors of one layout, batched QR for small bases. Arguments and result as in :func:`soap`.
    """
    skipped = Skipped([], [])
    lr_of, decay_of = (
        value.__getitem__ if isinstance(value, list) else lambda i, value=value: value for value in (lr, weight_decay)
    )
    gram, basis, offsets = (by_parameter(column, layouts) for column in (grams, bases, refresh_offsets))
    for bucket in buckets(exp_avgs, layouts):
        dtype = exp_avgs[bucket[0]].dtype
        grad = {i: prepare_gradient(grads[i], dtype, grad_scale, maximize) for i in bucket}
        # One transfer to the host for the bucket. (Nothing is written before it is known what is usable.)
        usable = is_usable(torch.stack(torch._foreach_norm(list(grad.values())))).tolist()
        if not all(usable):
            skipped.steps.extend(i for i, ok in zip(bucket, usable) if not ok)
            bucket = [i for i, ok in zip(bucket, usable) if ok]
            if not bucket:
                continue
        alike = batches(bucket, layouts)

        # 1 project
        projected: dict[int, Tensor] = {}
        for batch in alike:
            result = project(_stack(grad, batch), _stack_modes(basis, batch), layouts[batch[0]])
            projected.update(_unstack(result, batch))
        t = {}
        for i in bucket:
            state_steps[i] += 1
            t[i] = state_steps[i].item()

        # 2 adam
        m, v = [exp_avgs[i] for i in bucket], [exp_avg_sqs[i] for i in bucket]
        turned = [projected[i] for i in bucket]
        torch._foreach_lerp_(m, turned, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, turned, turned, 1 - beta2)
        del projected, turned
        denominators = torch._foreach_sqrt(v)
        torch._foreach_add_(denominators, eps)
        updates = list(torch._foreach_div(m, denominators))
        if eps < torch.finfo(dtype).tiny:  # 0, or 0 in this dtype
            for u, denominator in zip(updates, denominators):
                u.masked_fill_(denominator == 0, 0)
        del denominators

        # 3 project back. Orthogonal bases keep the norm, so that rms(U) = rms(U') and needs no pass after the products.
        if normalize_grads:
            torch._foreach_div_(updates, [u.square().mean().sqrt_().add_(1e-30) for u in updates])
        update = dict(zip(bucket, updates))
        del updates
        for batch in alike:
            result = project_back(_stack(update, batch), _stack_modes(basis, batch), layouts[batch[0]])
            update.update(_unstack(result, batch))

        # 4 apply
        ps = [params[i] for i in bucket]
        sizes = [-step_size(lr_of(i), t[i], beta1, beta2, correct_bias) for i in bucket]
        keeps = [1 - lr_of(i) * decay_of(i) for i in bucket]
        careful = may_overflow(sizes, keeps, eps, dtype)
        moved = [p.resolve_neg().to(dtype, copy=careful) for p in ps]  # (_foreach takes no negative views)
        for size, of in _alike(sizes).items():  # (several where a parameter missed a gradient, or groups differ)
            torch._foreach_add_([moved[k] for k in of], [update[bucket[k]] for k in of], alpha=size)
        del update
        for keep, of in _alike(keeps).items():
            if keep != 1:
                torch._foreach_mul_([moved[k] for k in of], keep)
        low = []
        for p, q in zip(ps, moved):
            if careful or p.dtype == torch.float16 or p.is_neg():
                copy_finite_(p, q)
            elif p is not q:
                low.append((p, q))
        if low:
            torch._foreach_copy_([p for p, _ in low], [q for _, q in low])

        # 5 gram EMA
        averaged, outers = [], []
        for batch in alike:
            for k, outer in enumerate(outer_products(_stack(grad, batch), layouts[batch[0]])):
                averaged += [gram[i][k] for i in batch]
                outers += _unstack(outer, batch).values()
        if averaged:
            torch._foreach_lerp_(averaged, outers, 1 - shampoo_beta)
        for i in bucket:
            if t[i] % FLUSH_PERIOD == 0:
                flush_subnormals_((exp_avgs[i], exp_avg_sqs[i], *gram[i]))

        # 6 refresh
        due = [
            (i, k)
            for i in bucket
            for k, offset in enumerate(offsets[i])
            if is_due(int(t[i]), int(offset), precondition_frequency, refresh)
        ]
        done, failed = _refresh_units(due, gram, basis, refresh, refresh_tolerance)
        for i, refreshed in done.items():
            reexpress_(exp_avgs[i], exp_avg_sqs[i], basis[i], layouts[i], refreshed)
        skipped.refreshes.extend(failed)
    return skipped


def may_overflow(step_sizes: Sequence[float], keeps: Sequence[float], eps: float, dtype: torch.dtype) -> bool:
    """Whether step 4 could leave the state's dtype: not where every keep is at most 1, and ||step_size U||, at most step_size
    ||m|| / eps with ||m|| at most that of the largest usable gradient, is lost in the rounding of the largest number."""
    largest = largest_squared_norm(dtype) ** 0.5
    limit = torch.finfo(dtype).max * torch.finfo(dtype).eps / 8
    return max(map(abs, keeps)) > 1 or not max(map(abs, step_sizes)) * largest < limit * eps


def copy_finite_(param: Tensor, moved: Tensor) -> None:
    """param <- moved, rounded once; entries that param's type cannot hold stay. (A float16 overflows at 65504.)"""
    rounded = moved.to(param.dtype)
    param.copy_(torch.where(rounded.isfinite(), rounded, param))


def _alike(values: list[float]) -> dict[float, list[int]]:
    """Places of each value."""
    places: dict[float, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(value, []).append(place)
    return places


def _stack(tensors: dict[int, Tensor] | list[Tensor], batch: list[int]) -> Tensor:
    """[N, *shape] of the batch's tensors; the tensor itself, without a copy, when it is alone."""
    return tensors[batch[0]] if len(batch) == 1 else torch.stack([tensors[i] for i in batch])


def _stack_modes(matrices: list[list[Tensor]], batch: list[int]) -> list[Tensor]:
    """For each mode the batch's matrices [N, d, d], or [d, d] when it is of one."""
    return [_stack({i: matrices[i][k] for i in batch}, batch) for k in range(len(matrices[batch[0]]))]


def _unstack(tensor: Tensor, batch: list[int]) -> dict[int, Tensor]:
    return {batch[0]: tensor} if len(batch) == 1 else dict(zip(batch, tensor.unbind(0)))


def _refresh_units(
    due: list[tuple[int, int]],
    grams: list[list[Tensor]],
    bases: list[list[Tensor]],
    refresh: str,
    refresh_tolerance: float,
) -> tuple[dict[int, dict[int, Refresh]], list[int]]:
    """Refresh the due units (parameter, position of the mode), small ones of equal size as one batch; and the parameters of
    those that failed."""
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
            if refresh == "adaptive":
                wanted = (off_diagonal_share(basis, product, eigenvalues) <= refresh_tolerance).logical_not_().tolist()
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


def _fused_soap(
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
    lr: float | Tensor | list[float],
    weight_decay: float | list[float],
    max_grad_norm: float | None,
    triton: dict[str, Any],
    **options: Any,
) -> Skipped:
    """The package's own kernels, one call for each device and dtype of state: C++ on a CPU, Triton on CUDA (``triton``: what
    only it takes). Arguments and result as in :func:`soap`."""
    skipped = Skipped([], [])
    ends = list(itertools.accumulate(len(layout.modes) for layout in layouts))
    kinds = alike(exp_avgs)
    if len(kinds) > 1:  # (one call looks at everything before it writes)
        for param, exp_avg in zip(params, exp_avgs):
            if state_dtype(param) != exp_avg.dtype:
                raise RuntimeError(f"a parameter is {param.dtype}, its state {exp_avg.dtype}")
    for (device, dtype), indices in kinds.items():

        def of(column: list, indices: list[int] = indices) -> list:
            return column if len(indices) == len(column) else [column[i] for i in indices]

        def of_modes(column: list, indices: list[int] = indices) -> list:
            if len(indices) == len(params):
                return column
            return [x for i in indices for x in column[ends[i] - len(layouts[i].modes) : ends[i]]]

        lists = [of(params), of(grads), of(exp_avgs), of(exp_avg_sqs)]
        lists += [of_modes(grams), of_modes(bases), of_modes(refresh_offsets), of(state_steps)]
        if runs_triton(exp_avgs[indices[0]]):
            group = GroupOptions(lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm, **options)
            left = fused_cuda_soap(*lists, of(layouts), grad_scale, [(len(indices), group)], **triton)
        elif device.type == "cuda":
            left = _multi_tensor_soap(*lists, of(layouts), grad_scale, lr=float(lr), weight_decay=weight_decay, **options)
        else:
            of_kind = tuple(of(layouts))
            tables = (layout_table(of_kind), scratch(of_kind, dtype))
            sizes = {
                name: of(value) if isinstance(value, list) else [float(value)]
                for name, value in (("lr", lr), ("weight_decay", weight_decay))
            }
            outcomes = torch.ops.soap_opt.step_(*lists, *tables, grad_scale, **sizes, **options)  # [P] int32
            left = Skipped([], [])
            for i, outcome in enumerate(outcomes.tolist() if outcomes.any() else ()):
                if outcome < 0:
                    left.steps.append(i)
                else:
                    left.refreshes.extend([i] * outcome)
        skipped.extend(left, indices)
    return skipped
