"""The first gradient: it makes a parameter's Grams and bases, and moves nothing."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import refresh_operator
from .batch import Skipped
from .cpu import cpu_first_grams
from .eigenbasis import EigenDecompositionError, init_bases, outer_products, same_for_all_threads
from .functional import Path, device_type_of, path_of, path_on
from .gradients import is_usable, largest_squared_norm, prepare_gradient, state_dtype
from .layout import Layout, outside_modes
from .options import Options
from .parameters import is_dataless
from .state import allocate
from .work import Work

if TYPE_CHECKING:
    from .soap import SOAP


def first_grams(
    grads: list[Tensor], layouts: list[Layout], dtype: torch.dtype, options: Options, grad_scale: Tensor | None
) -> list[tuple[list[Tensor] | None, bool]]:
    """The Grams of every first gradient, and whether any of its elements is not zero.

    The Gram of mode i, [d_i, d_i], is (1 - beta_s) times the gradient contracted with itself over all modes but i. A gradient
    that is not usable (see :func:`soap_opt.gradients.is_usable`) has None instead of Grams.

    Args:
        grads: first gradients of any dtype; never written.
        layouts: the layout of each gradient's parameter.
        dtype: the dtype of the parameters' state. A gradient may have another (``param.grad_dtype``).
        options: the options of the parameters' group.
        grad_scale: 1-element tensor that the gradients are divided by; None for 1.
    """
    if all(path_of(grad, options) is Path.CPU for grad in grads):
        made, squared_norms = cpu_first_grams(grads, layouts, dtype, grad_scale, options.gram_beta)
        limit = largest_squared_norm(dtype)
        return [(grams if norm <= limit else None, norm > 0) for grams, norm in zip(made, squared_norms)]
    result: list[tuple[list[Tensor] | None, bool]] = []
    for grad, layout in zip(grads, layouts):
        grad = prepare_gradient(grad, dtype, grad_scale, maximize=False)
        if is_usable(torch.linalg.vector_norm(grad)):
            with same_for_all_threads():
                outers = [(outer * (1 - options.gram_beta)).contiguous() for outer in outer_products(grad, layout)]
            result.append((outers, bool((grad.abs() >= torch.finfo(dtype).tiny).any())))
        else:
            result.append((None, True))
    return result


def initialize(optimizer: SOAP, pending: list[tuple[dict[str, Any], Tensor, Tensor]], scales: dict[int, Tensor | None]) -> None:
    """G_i <- (1 - beta_s) (G contracted over all modes but i), Q_i <- eigenvectors of G_i.

    Args:
        optimizer: the optimizer whose state takes the Grams and bases.
        pending: (group, parameter, gradient) for each parameter.
        scales: for each group, by its id, the scale that its gradients are divided by.

    Raises:
        RuntimeError: eigh cannot decompose a Gram; nothing has changed then.
        ValueError: a gradient and its parameter differ in shape.
    """
    usable: list[tuple[dict[str, Any], Tensor]] = []
    unusable: list[Tensor] = []
    grams: list[Tensor] = []
    owners: list[tuple[Tensor, str, str]] = []  # for each Gram: its parameter, its key, the key of its basis
    zeros: set[Tensor] = set()
    kinds: dict[tuple[int, torch.dtype], tuple[dict[str, Any], list[Tensor], list[Tensor]]] = {}
    for group, param, grad in pending:
        if grad.shape != param.shape:
            raise ValueError(
                f"the gradient of {optimizer._describe(param)} is of shape {tuple(grad.shape)}: it was made before the "
                "parameter got its shape; zero_grad() and backward() make another"
            )
        _, params, gradients = kinds.setdefault((id(group), state_dtype(param)), (group, [], []))
        params.append(param)
        gradients.append(grad)
    by_engine = True
    for (_, dtype), (group, params, gradients) in kinds.items():
        layouts, options = [optimizer._layout(p, group) for p in params], Options.of(group)
        has_operator = all(refresh_operator.why_missing(grad.device.type) is None for grad in gradients)
        by_engine = (
            by_engine
            and has_operator
            and all(path_on(device_type_of(grad), options) in (Path.CPU, Path.CUDA) for grad in gradients)
        )
        made = first_grams(gradients, layouts, dtype, options, scales[id(group)])
        for param, layout, (outers, says_something) in zip(params, layouts, made):
            if outers is None:
                unusable.append(param)
                continue
            usable.append((group, param))
            if not says_something:
                zeros.add(param)
            grams += outers
            owners += [(param, *keys) for keys in zip(layout.gram_keys, layout.basis_keys)]
    wanted = [i for i, (param, _, _) in enumerate(owners) if param not in zeros]
    try:
        by_engine = by_engine and len({gram.device for gram in grams}) == 1
        bases = dict(zip(wanted, init_bases([grams[i] for i in wanted], fused=by_engine)))
    except EigenDecompositionError as error:
        param, key, _ = owners[wanted[error.index]]
        state = optimizer.state.get(param)
        raise RuntimeError(
            f"SOAP: eigh failed on the Gram of mode {key[5:]} of {optimizer._describe(param)} at step "
            f"{int(state['step']) if state else 0}, in {state_dtype(param)} and in float64 ({error}); "
            "nothing has changed"
        ) from error

    optimizer._skips.add(unusable, Skipped(list(range(len(unusable))), []))
    allocate(optimizer, usable)
    for i, (param, gram_key, basis_key) in enumerate(owners):
        state = optimizer.state[param]
        if param not in zeros or gram_key not in state:  # (a second gradient of zeros keeps those of the first)
            state[gram_key] = grams[i]
            state[basis_key] = bases[i] if i in bases else torch.zeros_like(grams[i])
    for _, param in usable:
        if param not in zeros:
            optimizer.state[param]["initialized"].fill_(True)


def step_dataless(optimizer: SOAP, work: Work) -> Work:
    """Step the parameters that have shapes but no numbers, and return the rest. Such a step allocates state of the right
    shapes, or only counts t where there is state."""
    dataless = [is_dataless(param) for param in work.params]
    for param, layout in compress(zip(work.params, work.layouts), dataless):
        state = optimizer.state.get(param)
        if state:
            with outside_modes() if not is_dataless(state["step"]) else nullcontext():
                state["step"] += 1
            continue
        with outside_modes():
            allocate(optimizer, [(work.group, param)])
            optimizer.state[param]["initialized"].fill_(True)
        state = optimizer.state[param]
        for keys in (layout.gram_keys, layout.basis_keys):
            state.update({key: param.new_zeros(d, d, dtype=state_dtype(param)) for key, d in zip(keys, layout.sizes)})
    return work.where([not without for without in dataless])
