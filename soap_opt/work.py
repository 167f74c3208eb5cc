"""The work of one step: the parameters with a gradient of every param group, and which groups are stepped together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import refresh_operator
from .batch import Batch
from .cuda.problems import is_too_large
from .functional import Path, path_of, require_fused
from .layout import Layout
from .options import Options
from .state import misfit_of

if TYPE_CHECKING:
    from .soap import SOAP

# For each parameter with a gradient: the tensor to update, and the gradient
Given = dict[Tensor, tuple[Tensor, Tensor]]


class Work(NamedTuple):
    """A group's parameters that have a gradient, as parallel lists (see :class:`soap_opt.batch.Batch`)."""

    group: dict[str, Any]
    options: Options
    params: list[Tensor]
    tensors: list[Tensor]  # the tensors to update: the parameters, or their stand-ins in a compiled graph
    grads: list[Tensor]
    states: list[dict[str, Tensor]]  # empty before the first gradient
    layouts: list[Layout]

    def where(self, wanted: list[bool]) -> Work:
        return Work(
            self.group, self.options, list(compress(self.params, wanted)), list(compress(self.tensors, wanted)),
            list(compress(self.grads, wanted)), list(compress(self.states, wanted)), list(compress(self.layouts, wanted)),
        )  # fmt: skip


def with_grad(optimizer: SOAP, group: dict[str, Any], given: Given | None = None) -> Work:
    """The group's parameters that have a gradient, after every check that could fail.

    Args:
        given: for each parameter with a gradient, the tensor to update and the gradient; None stands for the parameters
            themselves and ``p.grad``.
    """
    options = Options.of(group)
    options.check()
    layouts, pinned_layouts = optimizer._layouts, optimizer._layouts.pinned
    shaping, stateless = layouts.shaping(group), dict[str, Tensor]()
    # Making these lists takes a good part of a step of thousands of small tensors: C functions make most of them in one go.
    params: list[Tensor] = list(group["params"])
    tensors, grads = params, [param.grad for param in params]
    if given is not None:
        pairs = [given.get(param, (param, None)) for param in params]
        tensors, grads = [tensor for tensor, _ in pairs], [grad for _, grad in pairs]
    present = [grad is not None for grad in grads]
    if not all(present):
        params, tensors = list(compress(params, present)), list(compress(tensors, present))
    found: list[Tensor] = [grad for grad in grads if grad is not None]
    if not {torch.strided}.issuperset(map(attrgetter("layout"), found)):
        param, grad = next((param, grad) for param, grad in zip(params, found) if grad.layout is not torch.strided)
        raise RuntimeError(f"SOAP does not support sparse gradients, but that of {optimizer._describe(param)} is {grad.layout}")
    state_of = optimizer.state.get
    states = [state_of(param, stateless) for param in params]
    chosen = [
        pinned.layout
        if pinned is not None
        and pinned.shaping is shaping
        and pinned.layout.shape == param.shape
        # (a matrix has no memory formats to choose from)
        and (len(pinned.stride) <= 2 or pinned.stride == param.stride())
        else layouts.of(param, group, state, optimizer._describe)
        for param, state, pinned in zip(params, states, map(pinned_layouts.get, map(id, params)))
    ]
    work = Work(group, options, params, tensors, found, states, chosen)
    if options.fused:
        for param in dict(zip(map(attrgetter("device"), params), params)).values():  # one for each device
            require_fused(options, param)
    return work


@contextmanager
def explained(works: Sequence[Work], describe: Callable[[Tensor], str]) -> Iterator[None]:
    """Where a step inside fails because a gradient or state does not fit its parameter, raise an error with the parameter's
    name, the cause and the remedy."""
    try:
        yield
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        for work in works:
            for param, grad, state, layout in zip(work.params, work.grads, work.states, work.layouts):
                explanation = misfit_of(param, grad, state, layout, describe(param))
                if explanation is not None:
                    raise RuntimeError(explanation) from error
        raise


def batch_of(works: Sequence[Work], clipped: bool = False) -> Batch:
    """The batch of these parameters, all initialised. clipped: the scale of their gradients already contains the clipping."""
    states = [state for work in works for state in work.states]
    layouts = [layout for work in works for layout in work.layouts]
    batch = Batch(
        [tensor for work in works for tensor in work.tensors],
        [grad for work in works for grad in work.grads],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [state[key] for state, layout in zip(states, layouts) for key in layout.gram_keys],
        [state[key] for state, layout in zip(states, layouts) for key in layout.basis_keys],
        [state[key] for state, layout in zip(states, layouts) for key in layout.offset_keys],
        [state["step"] for state in states],
        layouts,
        [work.options for work in works for _ in work.params],
    )
    return batch.with_options(max_grad_norm=None) if clipped else batch


def together(work: list[tuple[Work, Tensor | None]]) -> list[tuple[list[Work], Tensor | None]]:
    """Join groups, each with its scale, that one call can step. They then take as many launches or calls as one group; a model
    with a group for each parameter would take thousands."""
    if len(work) < 2:
        return [([w], scale) for w, scale in work]
    calls: dict[Any, tuple[list[Work], Tensor | None]] = {}
    for w, scale in work:
        options, exp_avgs = w.options, [state["exp_avg"] for state in w.states]
        devices = {exp_avg.device for exp_avg in exp_avgs}
        key: Any = id(w)
        if len(devices) == 1:
            paths = {path_of(exp_avg, options) for exp_avg in {x.dtype: x for x in exp_avgs}.values()}
            if paths == {Path.CUDA}:
                key = (*devices, id(scale), options.agree_on_cuda())
            elif options.max_grad_norm is None and paths in ({Path.CPU}, {Path.MULTI}):
                key = (*devices, id(scale), options.agree_on_cpu())
        calls.setdefault(key, ([], scale))[0].append(w)
    return list(calls.values())


def looks_at_found_inf(work: Work) -> bool:
    """Whether the kernels that step these parameters read found_inf on the device."""
    return all(path_of(param, work.options, layout) is Path.CUDA for param, layout in zip(work.params, work.layouts))


def check_capture(work: Sequence[Work], not_initialized: Sequence[Tensor], describe: Callable[[Tensor], str]) -> None:
    """Raise unless the step can be recorded into a CUDA graph. not_initialized: parameters that are at their first gradient."""
    for why in _reasons_against_capture(work, not_initialized, describe):
        raise RuntimeError(f"a step of SOAP cannot be recorded into a CUDA graph: {why}")


def _reasons_against_capture(
    work: Sequence[Work], not_initialized: Sequence[Tensor], describe: Callable[[Tensor], str]
) -> Iterator[str]:
    if not_initialized:
        yield f"{describe(not_initialized[0])} is not initialised: step it before, outside of the capture"
    missing = refresh_operator.why_missing("cuda")
    if missing is not None:
        yield missing
    device = torch.device("cuda", torch.cuda.current_device())
    for w in work:
        if not w.options.capturable:
            yield "capturable=False"
        for param, state, layout in zip(w.params, w.states, w.layouts):
            if path_of(param, w.options, layout) is not Path.CUDA:
                if is_too_large(layout):
                    yield f"{describe(param)} or a matrix of it is beyond the kernels' int32 offsets"
                yield f"{describe(param)} is not stepped by the fused CUDA path: set fused=True, and not float64"
            elif state["step"].device != param.device:  # fused or capturable was set after the state was made
                yield f"the step of {describe(param)} is on {state['step'].device}: load a state_dict"
            elif param.device != device:
                yield f"{describe(param)} is on {param.device}, and the graph on {device}"
