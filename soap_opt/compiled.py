"""``optimizer.step()`` inside a compiled function: one operator, opaque to torch.compile.

Dynamo could trace the step, but the result would be worse: kernels that read pointer tables have no graph that a compiler
could fuse, and every state tensor would become a guarded input of the graph. So the graph gets one node,
``soap_opt::optimizer_step_``, which changes the parameters. The optimizer keeps its state outside of the graph, as a random
generator does.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .soap import SOAP

# Optimizers by their numbers, as long as they live: an operator takes tensors and numbers only.
_optimizers: weakref.WeakValueDictionary[int, SOAP] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(optimizer: SOAP) -> int:
    """The number by which :func:`optimizer_step_` finds the optimizer. A copy of the optimizer gets another."""
    number = next(_numbers)
    _optimizers[number] = optimizer
    return number


# cudagraph_unsafe: Inductor's own CUDA graphs (mode="reduce-overhead") leave the step out: they do not know its memory.
@torch.library.custom_op(
    "soap_opt::optimizer_step_",
    mutates_args=("params",),
    tags=(torch.Tag.cudagraph_unsafe, torch.Tag.needs_exact_strides),
)
def optimizer_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    places: Sequence[int],
    number: int,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of a SOAP optimizer.

    Args:
        params: the parameters with a gradient, updated in place.
        grads: the same shapes; never written. In a graph they need not be ``p.grad``, which is only set when the graph has run.
        places: each parameter's index over all groups.
        number: the optimizer's, from :func:`register`. The optimizer's options are read when the operator runs.
        grad_scale, found_inf: the attributes that GradScaler sets on the optimizer.
    """
    try:
        instance = _optimizers[number]
    except KeyError:
        raise RuntimeError("a compiled function steps a SOAP optimizer that no longer exists") from None
    owners = all_params(instance)
    if len(owners) != len(instance._traced_params) or not all(map(operator.is_, owners, instance._traced_params)):
        instance._traced_params = owners
        raise RuntimeError(
            "param_groups were changed other than by add_param_group after the step was compiled; nothing was stepped, and the "
            "next call compiles it anew"
        )
    given = {owners[place]: (param, grad) for place, param, grad in zip(places, params, grads)}
    instance._step(given, grad_scale, found_inf)


@optimizer_step_.register_fake
def _(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    places: Sequence[int],
    number: int,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    return None


def all_params(optimizer: SOAP) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def step_in_graph(optimizer: SOAP) -> None:
    """The part of :meth:`SOAP.step` that Dynamo traces.

    It reads ``_traced_params``, a list of its own: where code reads ``param_groups``, Dynamo guards every option, and sets
    ``capturable`` of CUDA parameters that have no state yet.
    """
    params, grads, places = [], [], []
    for place, param in enumerate(optimizer._traced_params):
        if param.grad is not None:
            params.append(param)
            grads.append(param.grad)
            places.append(place)
    scale, found = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    optimizer_step_(params, grads, places, optimizer._number, scale, found)
