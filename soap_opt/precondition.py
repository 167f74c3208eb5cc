"""The update that SOAP's present state gives for a gradient: the step's linear map, without the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .eigenbasis import full_precision_matmul, project, same_for_all_threads
from .gradients import prepare_gradient
from .layout import Layout
from .options import Options
from .single_tensor import step_size, update_of

if TYPE_CHECKING:
    from .soap import SOAP


def precondition(optimizer: SOAP, grads: Iterable[Tensor | None]) -> list[Tensor | None]:
    """See :meth:`soap_opt.SOAP.precondition`."""
    owners = [(group, param) for group in optimizer.param_groups for param in group["params"]]
    if isinstance(grads, (Tensor, dict)):
        raise TypeError(f"grads must be a sequence with a tensor or None for each parameter, got {type(grads).__name__}")
    grads = list(grads)
    if len(grads) != len(owners):
        raise ValueError(f"grads must have one entry for each of the {len(owners)} parameters, got {len(grads)}")
    for (_, param), grad in zip(owners, grads):
        if grad is None:
            continue
        if not isinstance(grad, Tensor):
            raise TypeError(f"grads must be tensors or None, got {type(grad).__name__} for {optimizer._describe(param)}")
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"SOAP does not support sparse gradients, but that of {optimizer._describe(param)} is {grad.layout}"
            )
        if not is_lazy(param) and grad.shape != param.shape:
            raise ValueError(f"the gradient for {optimizer._describe(param)} is of shape {tuple(grad.shape)}")
    optimizer.wait_for_refresh()
    updates: list[Tensor | None] = [None] * len(grads)
    with full_precision_matmul({param.device.type for _, param in owners}), same_for_all_threads():
        for i, ((group, param), grad) in enumerate(zip(owners, grads)):
            state = optimizer.state.get(param)
            if grad is not None and state and state["initialized"] and state["step"] > 0:
                updates[i] = _precondition(grad, state, optimizer._layout(param, group), Options.of(group))
    return updates


def _precondition(grad: Tensor, state: dict[str, Tensor], layout: Layout, options: Options) -> Tensor:
    """Steps 1 to 3 of :func:`soap_opt.single_tensor._single_tensor_soap` with m = G', times step 4's c for b1 = 0."""
    v, bases = state["exp_avg_sq"], [state[key] for key in layout.basis_keys]
    projected = project(prepare_gradient(grad.detach(), v.dtype, None, options.maximize), bases, layout)
    update = update_of(projected, v, bases, layout, options)
    return update * step_size(1.0, state["step"].item(), 0.0, options.beta2, options.correct_bias)
