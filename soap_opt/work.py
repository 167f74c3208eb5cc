"""What one step works on: of each param group the parameters with a gradient, and which groups are stepped together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import refresh_basis
from .functional import runs_triton, use_fused
from .fused_cuda import steps_on_device
from .launch import is_too_large
from .options import list_kind, step_kind
from .plan import Layout


class Work(NamedTuple):
    """A group's parameters that have a gradient. Parallel lists: an object for each parameter would keep Python's garbage
    collector busy for a third of a step of 2,000 small ones."""

    group: dict[str, Any]
    params: list[Tensor]
    tensors: list[Tensor]  # what is updated: the parameters, or what stands for them in a compiled graph
    grads: list[Tensor]
    states: list[dict[str, Tensor] | None]
    layouts: list[Layout]

    def where(self, wanted: list[bool]) -> Work:
        return Work(self.group, *(list(compress(column, wanted)) for column in self[1:]))


def together(work: list[tuple[Work, Tensor | None]]) -> list[tuple[list[Work], Tensor | None]]:
    """Groups, each with its scale, put together where one call can step them: the number of launches, or of calls (of which a
    group for each parameter would make thousands), is then that of one group."""
    if len(work) < 2:
        return [([w], scale) for w, scale in work]
    calls: dict[Any, tuple[list[Work], Tensor | None]] = {}
    for w, scale in work:
        group, exp_avgs = w.group, [state["exp_avg"] for state in w.states]
        devices = {exp_avg.device for exp_avg in exp_avgs}
        key: Any = id(w)
        if len(devices) == 1:
            (device,) = devices
            fused = use_fused(exp_avgs[:1], group["foreach"], group["fused"])
            if fused and all(map(runs_triton, exp_avgs)):
                key = (device, id(scale), step_kind(group))
            elif group["max_grad_norm"] is None and (device.type == "cpu" if fused else group["foreach"] is not False):
                key = (device, id(scale), list_kind(group))
        calls.setdefault(key, ([], scale))[0].append(w)
    return list(calls.values())


def check_capture(work: Sequence[Work], not_initialized: Sequence[Tensor], describe: Callable[[Tensor], str]) -> None:
    """Raise unless the step can be recorded into a CUDA graph. not_initialized: parameters whose first gradient this is."""
    for why in _reasons_against_capture(work, not_initialized, describe):
        raise RuntimeError(f"a step of SOAP cannot be recorded into a CUDA graph: {why}")


def _reasons_against_capture(
    work: Sequence[Work], not_initialized: Sequence[Tensor], describe: Callable[[Tensor], str]
) -> Iterator[str]:
    if not_initialized:
        yield f"{describe(not_initialized[0])} is not initialised: step it before, outside of the capture"
    missing = refresh_basis.unavailable("cuda")
    if missing is not None:
        yield missing
    device = torch.device("cuda", torch.cuda.current_device())
    for w in work:
        if not w.group["capturable"]:
            yield "capturable=False"
        for param, state, layout in zip(w.params, w.states, w.layouts):
            if not steps_on_device(w.group, param):
                yield f"{describe(param)} is not stepped by the fused CUDA path: set fused=True, and not float64"
            elif is_too_large(layout):
                yield f"{describe(param)} or a matrix of it is beyond the kernels' int32 offsets"
            elif state["step"].device != param.device:  # fused or capturable were set when there was a state
                yield f"the step of {describe(param)} is on {state['step'].device}: load a state_dict"
            elif param.device != device:
                yield f"{describe(param)} is on {param.device}, and the graph on {device}"


def keep_on_host(states: Iterable[dict[str, Any]]) -> None:
    """What the host reads at every step back to the CPU, where a trainer moved all of the state to its device (Lightning does
    after a resume): each read would wait for the device."""
    for state in states:
        if "initialized" in state and state["initialized"].device.type == "cpu":
            return  # it was moved with all others, or not
        for key in state:
            if key == "initialized" or key.startswith("refresh_offset_"):
                state[key] = state[key].cpu()
