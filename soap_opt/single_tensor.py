"""The specification of a step. Every other implementation does the same to the same state, and is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Batch, Skipped
from .eigenbasis import (
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
from .gradients import is_usable, prepare_gradient
from .layout import Layout
from .options import Options
from .schedule import is_due


@same_for_all_threads()
def _single_tensor_soap(batch: Batch, grad_scale: Tensor | None) -> Skipped:
    """One parameter after the other, step by step.

    Args:
        batch: tensors on any device, of any dtypes. The caller has applied max_grad_norm already, through grad_scale.
        grad_scale: 1-element tensor that the gradients are divided by; None for 1.
    """
    skipped = Skipped([], [])
    lrs = batch.learning_rates()
    matrices = (batch.by_parameter(column) for column in (batch.grams, batch.bases, batch.refresh_offsets))
    for i, (param, gram, basis, offsets) in enumerate(zip(batch.params, *matrices)):
        m, v, layout, lr, o = batch.exp_avgs[i], batch.exp_avg_sqs[i], batch.layouts[i], lrs[i], batch.options[i]
        grad = prepare_gradient(batch.grads[i], m.dtype, grad_scale, o.maximize)
        if not is_usable(torch.linalg.vector_norm(grad)):
            skipped.steps.append(i)
            continue

        # 1 project:  G' = G x_1 Q_1 ... x_k Q_k;  t <- t + 1
        projected = project(grad, basis, layout)
        batch.state_steps[i] += 1
        t = batch.state_steps[i].item()

        # 2 adam:  m <- b1 m + (1 - b1) G';  v <- b2 v + (1 - b2) G'^2;  U' = m / (sqrt(v) + eps)
        m.lerp_(projected, 1 - o.beta1)
        v.mul_(o.beta2).addcmul_(projected, projected, value=1 - o.beta2)
        flush_subnormals_((m, v))

        # 3 project back:  U = U' x_1 Q_1^T ... x_k Q_k^T
        update = update_of(m, v, basis, layout, o)

        # 4 apply:  p <- p - lr c U;  p <- p (1 - lr weight_decay).  In the state's dtype: a bfloat16 p is rounded once.
        moved = param.to(m.dtype).sub(update, alpha=step_size(lr, t, o.beta1, o.beta2, o.correct_bias))
        if o.weight_decay != 0:
            moved.mul_(1 - lr * o.weight_decay)
        copy_finite_(param, moved)

        # 5 gram EMA:  G_i <- beta_s G_i + (1 - beta_s) (G contracted with itself over all modes but i)
        for g, outer in zip(gram, outer_products(grad, layout)):
            g.lerp_(outer, 1 - o.gram_beta)
        flush_subnormals_(gram)

        # 6 refresh:  P = G_i Q_i;  e = diag(Q_i^T P);  Q_i' = qr(P, columns by falling e).Q;  v permuted, m turned
        refreshed: dict[int, Refresh] = {}
        for k, (g, q) in enumerate(zip(gram, basis)):
            if is_due(int(t), int(offsets[k]), o.precondition_frequency, o.refresh):
                product, eigenvalues = gram_times_basis(g, q)
                # (A share of NaN does not keep the basis: its refresh fails, and is counted.)
                if o.refresh != "adaptive" or not off_diagonal_share(q, product, eigenvalues) <= o.refresh_tolerance:
                    new = refresh_basis(q, product, eigenvalues)
                    if is_orthogonal(new.basis):
                        refreshed[k] = new
                    else:
                        skipped.refreshes.append(i)
        if refreshed:
            reexpress_(m, v, basis, layout, refreshed)
    return skipped


def update_of(m: Tensor, v: Tensor, basis: list[Tensor], layout: Layout, options: Options) -> Tensor:
    """U [*shape] of step 3 from m and v: U' = m / (sqrt(v) + eps), 0 where the denominator is 0, projected back."""
    denominator = v.sqrt().add_(options.eps)
    update = project_back(torch.where(denominator > 0, m / denominator, 0), basis, layout)
    if options.normalize_grads:
        update = update / (1e-30 + update.square().mean().sqrt())
    return update


def step_size(lr: float, t: float, beta1: float, beta2: float, correct_bias: bool) -> float:
    """lr * c with c = sqrt(1 - b2^t) / (1 - b1^t), or 1 without bias correction."""
    return lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t) if correct_bias else lr


def copy_finite_(param: Tensor, moved: Tensor) -> None:
    """param <- moved, rounded once; an entry that param's dtype cannot hold stays as it was. (float16 overflows at 65504.)"""
    rounded = moved.to(param.dtype)
    param.copy_(torch.where(rounded.isfinite(), rounded, param))
