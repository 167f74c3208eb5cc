"""Gradients, for every implementation in PyTorch: their preparation, which of them are usable, and clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from .eigenbasis import same_for_all_threads


def state_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a parameter's state: float64 for float64 parameters, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def prepare_gradient(grad: Tensor, dtype: torch.dtype, grad_scale: Tensor | None, maximize: bool) -> Tensor:
    """The gradient of the objective to minimise, in the state's dtype, divided by GradScaler's scale. It shares p.grad's memory
    only where nothing had to be changed."""
    grad = grad.to(dtype)
    if grad_scale is not None:
        grad = grad / grad_scale.to(device=grad.device, dtype=dtype).reshape(())  # a scale [1] would make a 0-d gradient [1]
    return -grad if maximize else grad


def is_usable(norm: Tensor) -> Tensor:
    """Whether ||G||_F^2 is at most :func:`largest_squared_norm`, which bounds every entry of G in any basis, of its Grams and
    of v. norm: ||G||_F."""
    return norm.square() <= largest_squared_norm(norm.dtype)  # false for NaN


def largest_squared_norm(dtype: torch.dtype) -> float:
    """The largest ||G||_F^2 of a usable gradient: a quarter of the dtype's largest number, which leaves room for rounding."""
    return torch.finfo(dtype).max / 4


def clipping_scale(grads: list[Tensor], grad_scale: Tensor | None, max_grad_norm: float) -> Tensor:
    """The scale [1] such that dividing by it clips the gradients as ``clip_grad_norm_(params, max_grad_norm)`` does.

    A gradient that is not usable does not count in the total norm: its parameter stays as it is and the others move on.
    """
    device, dtype = grads[0].device, state_dtype(grads[0])
    with same_for_all_threads():
        norms = torch.stack([torch.linalg.vector_norm(grad, dtype=state_dtype(grad)).to(device, dtype) for grad in grads])
    scale = norms.new_ones(1) if grad_scale is None else grad_scale.to(device, dtype).reshape(1)
    norms = norms / scale
    total: Tensor = torch.linalg.vector_norm(torch.where(is_usable(norms), norms, 0))
    return scale / (max_grad_norm / (total + 1e-6)).clamp(max=1.0)
