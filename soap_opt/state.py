"""The state of parameters: its tensors, their layouts and allocation, and errors for state that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .functional import Path, path_of
from .gradients import state_dtype
from .layout import Layout, layout_of, memory_order, outside_modes
from .options import SHAPING, Options
from .schedule import complete_offsets, unit_flops

if TYPE_CHECKING:
    from .soap import SOAP

ParamGroup = dict[str, Any]
State = dict[str, Tensor]  # of one parameter


class Pinned(NamedTuple):
    """A parameter's layout, and the parameter, options and strides for which the layout was made."""

    param: Tensor  # held, so that no other tensor gets its id
    shaping: tuple[Any, ...]  # values of options.SHAPING; equal values are one tuple object
    layout: Layout
    stride: tuple[int, ...]


class Layouts:
    """The layouts of an optimizer's parameters. They are derived, with one exception: a parameter's first layout pins the
    options that shape its state.

    Attributes:
        pinned: one record for each parameter, by its id (hashing tensors would take a twentieth of a step of thousands of small
            parameters).
    """

    def __init__(self) -> None:
        self.pinned: dict[int, Pinned] = {}
        self._shaping: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def shaping(self, group: ParamGroup) -> tuple[Any, ...]:
        """Values of the group's options that shape state; equal values are one tuple object, so that ``is`` compares them."""
        values = tuple(group[name] for name in SHAPING)
        return self._shaping.setdefault(values, values)

    def of(self, param: Tensor, group: ParamGroup, state: State | None, describe: Callable[[Tensor], str]) -> Layout:
        """The parameter's layout, made anew where its shape or memory format has changed. describe: names it in an error.

        Raises:
            ValueError: the shape, or an option that shapes the state, was changed under existing state.
        """
        shaping = self.shaping(group)
        pinned, shape, stride = self.pinned.get(id(param)), tuple(param.shape), param.stride()
        if pinned is not None and pinned.shaping is shaping and pinned.layout.shape == shape and pinned.stride == stride:
            return pinned.layout
        if state and tuple(state["exp_avg"].shape) != shape:
            raise ValueError(
                f"{describe(param)} had the shape {tuple(state['exp_avg'].shape)} when its state was made: to go on with "
                f"another, forget that state (del optimizer.state[param]) or make a new optimizer"
            )
        if pinned is not None and state and pinned.shaping is not shaping:
            changed = [
                f"{name} from {old!r} to {new!r}" for name, old, new in zip(SHAPING, pinned.shaping, shaping) if old != new
            ]
            raise ValueError(
                f"{describe(param)} has state, which {' and '.join(changed)} would reshape: set it before the first "
                "step, or put the parameter into a new optimizer"
            )
        order = memory_order(torch.empty_like(param, device="meta"))  # memory order of the state's tensors
        if state and memory_order(state["exp_avg"]) != order:
            # model.to(memory_format=..) after the first step: the state follows, as it would after load_state_dict
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].data = torch.empty_like(param, dtype=state[key].dtype).copy_(state[key])
        layout = layout_of(shape, order, **dict(zip(SHAPING, shaping)))
        self.pinned[id(param)] = Pinned(param, shaping, layout, stride)
        return layout


def expected_state(param: Tensor, layout: Layout) -> list[tuple[str, tuple[int, ...], torch.dtype, torch.device | None]]:
    """Keys, shapes, dtypes and devices (None: any) of the state that a step reads and writes."""
    dtype, device = state_dtype(param), param.device
    matrices = zip(layout.gram_keys, layout.basis_keys, layout.sizes)
    return [
        ("exp_avg", tuple(param.shape), dtype, device),
        ("exp_avg_sq", tuple(param.shape), dtype, device),
        *((key, (d, d), dtype, device) for gram, basis, d in matrices for key in (gram, basis)),
        ("step", (), torch.float32, None),
        *((key, (), torch.int64, None) for key in layout.offset_keys),
    ]


def step_device(param: Tensor, options: Options) -> torch.device:
    """The device of t: the parameter's device where the step reads t on it, otherwise the CPU."""
    there = options.capturable or options.fused or path_of(param, options) is Path.CUDA
    return param.device if there else torch.device("cpu")


def step_tensor(value: float, param: Tensor, options: Options) -> Tensor:
    # float32 always: torch.set_default_dtype must not decide what a checkpoint holds
    return torch.tensor(value, dtype=torch.float32, device=step_device(param, options))


def allocate(optimizer: SOAP, params: Iterable[tuple[ParamGroup, Tensor]]) -> None:
    """Allocate state without Grams and bases, with initialized False, for every parameter that has no state."""
    new = [(group, p) for group, p in params if not optimizer.state.get(p)]
    offsets = refresh_offsets(optimizer) if new else {}
    for group, param in new:
        layout = optimizer._layout(param, group)
        dtype = state_dtype(param)
        state = optimizer.state[param]
        state["step"] = step_tensor(0.0, param, Options.of(group))
        state["initialized"] = torch.tensor(False, device="cpu")
        state["exp_avg"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        for key, offset in zip(layout.offset_keys, offsets[param]):
            state[key] = torch.tensor(offset, dtype=torch.int64, device="cpu")


def add_missing_offsets(optimizer: SOAP) -> None:
    """Add refresh offsets to state that has none: state from a checkpoint of the original implementation."""
    offsets = None
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param)
            if not state:
                continue
            for place, key in enumerate(optimizer._layout(param, group).offset_keys):
                if key not in state:
                    offsets = offsets or refresh_offsets(optimizer)
                    state[key] = torch.tensor(offsets[param][place], dtype=torch.int64, device="cpu")


@outside_modes()
def refresh_offsets(optimizer: SOAP) -> dict[Tensor, list[int]]:
    """Refresh offsets of every parameter's modes: the offsets in the state, and balanced offsets for modes without one."""
    offsets: dict[Tensor, list[int]] = {}
    for frequency in sorted({group["precondition_frequency"] for group in optimizer.param_groups}):
        owners: list[Tensor] = []
        flops: list[float] = []
        saved: list[int | None] = []
        starts: list[int] = []
        for group in optimizer.param_groups:
            if group["precondition_frequency"] == frequency:
                for param in group["params"]:
                    if is_lazy(param):  # its shape, and so the cost of its refreshes, is not known yet
                        continue
                    layout, state = optimizer._layout(param, group), optimizer.state.get(param, {})
                    offsets[param] = []
                    for key, size in zip(layout.offset_keys, layout.sizes):
                        offset = state.get(key)
                        owners.append(param)
                        flops.append(unit_flops(layout.numel, size))
                        saved.append(None if offset is None else int(offset))
                        starts.append(group["refresh_start"])
        for param, offset in zip(owners, complete_offsets(flops, saved, frequency, starts)):
            offsets[param].append(offset)
    return offsets


def keep_on_host(states: Iterable[dict[str, Any]]) -> None:
    """Move the tensors that the host reads at every step back to the CPU, where a trainer moved the whole state to its device
    (Lightning does after a resume). There every read would wait for the device."""
    for state in states:
        if "initialized" in state and state["initialized"].device.type == "cpu":
            return  # a trainer moves all states or none: the first one tells
        for key in state:
            if key == "initialized" or key.startswith("refresh_offset_"):
                state[key] = state[key].cpu()


def misfit_of(param: Tensor, grad: Tensor, state: State, layout: Layout, description: str) -> str | None:
    """Why the gradient or the state does not fit a parameter: its name, the cause and the remedy; None where both fit."""
    remedy = (
        "Where the model was moved or converted after its first step, load_state_dict(optimizer.state_dict()) lets the "
        "state follow; where the state was changed by hand, del optimizer.state[param] forgets it"
    )
    what = f"SOAP cannot step {description}, {param.dtype} on {param.device}: "
    if grad.shape != param.shape:
        return f"{what}its gradient is of shape {tuple(grad.shape)}"
    for key, shape, dtype, device in expected_state(param, layout):
        value = state.get(key)
        if value is None:
            return f"{what}its state lacks {key}. {remedy}"
        if not (tuple(value.shape) == shape and value.dtype == dtype and device in (None, value.device)):
            return (
                f"{what}its state {key} is {tuple(value.shape)}, {value.dtype} on {value.device}, and {shape}, "
                f"{dtype} is needed. {remedy}"
            )
    return None
