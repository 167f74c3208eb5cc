"""Restoring state from a state_dict, and the import of checkpoints that the original implementation wrote."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .eigenbasis import full_precision_matmul, project
from .gradients import state_dtype
from .layout import Layout, layout_of, memory_order, outside_modes
from .options import DEFAULTS, SHAPING, Options
from .state import expected_state, step_device

if TYPE_CHECKING:
    from .soap import SOAP

# Keys that tell a state of the original implementation, for an error that helps
_ORIGINAL_KEYS = ("GG", "Q")


def restore_state(optimizer: SOAP, state_dict: dict[str, Any]) -> dict[Any, Any] | None:
    """The state of ``state_dict`` as a fresh run would hold it, keyed by parameter.

    Each tensor gets its dtype, device and memory format; a tensor that has them already is taken over, not copied.

    Returns:
        None when the groups do not match, so that torch's own load_state_dict raises its error.

    Raises:
        ValueError: the state does not fit; the error names the parameter, the key and the fault. Nothing has changed.
    """
    saved_groups = state_dict["param_groups"]
    if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in optimizer.param_groups]:
        return None
    if state_dict["state"] and not any("precondition_frequency" in group for group in saved_groups):
        names = ", ".join(str(name) for name in saved_groups[0] if name != "params") if saved_groups else "nothing"
        raise ValueError(
            f"the state_dict was written by another optimizer: its param groups have {names}. To go over to SOAP in a run, "
            "load the model alone and give SOAP no state: its first gradient makes the bases"
        )
    state = dict(state_dict["state"])
    restored: dict[Any, Any] = {}
    for group, saved_group in zip(optimizer.param_groups, saved_groups):
        options = {**optimizer.defaults, **saved_group}
        for param, key in zip(group["params"], saved_group["params"]):
            raw = state.pop(key, None)
            if raw:
                restored[param] = _restore_param(param, raw, options, optimizer._describe)
    restored.update(state)  # entries that belong to no parameter are kept as they are, as torch does
    return restored


def _layout_for(param: Tensor, options: dict[str, Any]) -> Layout:
    return layout_of(tuple(param.shape), memory_order(param), **{name: options[name] for name in SHAPING})


def _restore_param(
    param: Tensor, raw: dict[str, Any], options: dict[str, Any], describe: Callable[[Tensor], str]
) -> dict[str, Any]:
    layout = _layout_for(param, options)
    shapes = {key: shape for key, shape, _, device in expected_state(param, layout) if device is not None}
    if all(key in raw for key in _ORIGINAL_KEYS):
        raise ValueError(
            f"the state of {describe(param)} was written by the original SOAP: use soap_opt.load_original_state_dict"
        )
    missing = [key for key in ("step", *shapes) if key not in raw]
    if missing:
        raise ValueError(f"the state of {describe(param)} lacks {', '.join(missing)}; it has {', '.join(map(str, raw))}")
    unknown = [key for key in raw if str(key).startswith(("gram_", "basis_")) and key not in shapes]
    if unknown:
        raise ValueError(
            f"the state of {describe(param)} has {', '.join(unknown)}, for which its options have no preconditioned mode"
        )

    dtype = state_dtype(param)
    result: dict[str, Any] = {}
    for key, value in raw.items():
        if key in shapes:
            if tuple(value.shape) != shapes[key]:
                raise ValueError(
                    f"the state of {describe(param)}: {key} has shape {tuple(value.shape)}, but {shapes[key]} is expected"
                )
            value = value.to(dtype=dtype, device=param.device)
            like = torch.empty_like(param, dtype=dtype) if key.startswith("exp_avg") else None
            if like is not None and value.stride() != like.stride():
                value = like.copy_(value)
            elif like is None:
                value = value.contiguous()
        elif key in ("step", "initialized") or str(key).startswith("refresh_offset_"):
            value = _number(param, key, value, options, describe)
        result[key] = value
    if "initialized" not in result:
        # a parameter that still waits for its first gradient holds bases of zeros
        bases = [result[f"basis_{mode}"] for mode in layout.modes]
        started = bool(result["step"] > 0) or any(bool(basis.any()) for basis in bases)
        result["initialized"] = torch.tensor(started, device="cpu")
    return result


@outside_modes()
def _number(param: Tensor, key: str, value: Any, options: dict[str, Any], describe: Callable[[Tensor], str]) -> Tensor:
    """A count or a flag of a loaded state as a fresh run would hold it: a 0-d tensor with data, under any torch mode."""
    dtype, device = torch.int64, torch.device("cpu")
    if key == "step":
        dtype = torch.float32
        device = step_device(param, Options.of({**DEFAULTS, **options}))
    elif key == "initialized":
        dtype = torch.bool
    number = torch.as_tensor(value).to(dtype=dtype, device=device)
    if number.numel() != 1:
        raise ValueError(f"the state of {describe(param)}: {key} has shape {tuple(number.shape)}, but one number is expected")
    return number.reshape(())


def load_original_state_dict(optimizer: SOAP, state_dict: dict[str, Any], exp_avg_space: str = "eigenbasis") -> None:
    """Continue a run whose checkpoint the original SOAP (github.com/nikhilvyas/SOAP) wrote.

    The original keeps, for each parameter, ``exp_avg``, ``exp_avg_sq``, ``GG`` and ``Q`` (lists over the modes of the merged
    view, ``[]`` where a mode is not preconditioned), ``step``, ``precondition_frequency`` and ``shampoo_beta``.
    Hyper-parameters in the checkpoint's param groups are taken over as ``load_state_dict`` does; the optimizer keeps all
    others. The original does not save ``data_format``: construct the optimizer with the one that the run used. For its
    refresh schedule pass ``refresh="together"``.

    Args:
        optimizer: a :class:`soap_opt.SOAP` over the same parameters in the same order.
        state_dict: what ``state_dict()`` of the original returned.
        exp_avg_space: "eigenbasis", or "parameter" for checkpoints from before the original's "momentum change", which kept
            exp_avg in parameter space.

    Raises:
        ValueError: the state does not fit the optimizer's parameters; the optimizer is as it was.
    """
    if exp_avg_space not in ("eigenbasis", "parameter"):
        raise ValueError(f"Invalid exp_avg_space: {exp_avg_space!r} (eigenbasis or parameter)")
    groups = []
    for i, saved in enumerate(state_dict["param_groups"]):
        own = optimizer.param_groups[i] if i < len(optimizer.param_groups) else {}
        options = {name: saved[name] for name in saved if name in own and name != "params"}
        groups.append({**{k: v for k, v in own.items() if k != "params"}, **options, "params": saved["params"]})
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in optimizer.param_groups]:
        raise ValueError(
            f"the checkpoint has param groups of {[len(g['params']) for g in groups]} parameters, the optimizer of "
            f"{[len(g['params']) for g in optimizer.param_groups]}"
        )

    state: dict[Any, dict[str, Any]] = {}
    differences: dict[str, list[str]] = {}
    for own, group in zip(optimizer.param_groups, groups):
        for param, key in zip(own["params"], group["params"]):
            raw = state_dict["state"].get(key)
            if not raw:
                continue
            layout = _layout_for(param, group)
            state[key] = _import_param(param, raw, layout, exp_avg_space, optimizer._describe(param))
            for text in _differences(raw, group):
                differences.setdefault(text, []).append(optimizer._describe(param))
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for text, where in differences.items():
        more = f" and {len(where) - 1} more" if where[1:] else ""
        warnings.warn(f"load_original_state_dict: {text} (in {where[0]}{more})", stacklevel=2)


def _differences(raw: dict[str, Any], group: dict[str, Any]) -> list[str]:
    """One text for each of frequency and beta that differs between the state, which the original obeys, and the group, which
    is used from now on."""
    options = Options.of(group)
    used = {"precondition_frequency": options.precondition_frequency, "shampoo_beta": options.gram_beta}
    return [
        f"the state's {name} is {raw[name]}, the group's is {value}, which is used from now on"
        for name, value in used.items()
        if name in raw and not math.isclose(raw[name], value)
    ]


def _import_param(param: Tensor, raw: dict[str, Any], layout: Layout, exp_avg_space: str, description: str) -> dict[str, Any]:
    lacking = [key for key in ("step", "exp_avg", "exp_avg_sq", "GG", "Q") if key not in raw]
    if lacking:
        raise ValueError(f"the checkpoint's state of {description} lacks {', '.join(lacking)}: not one of the original SOAP")
    for key in ("exp_avg", "exp_avg_sq"):
        if tuple(raw[key].shape) != tuple(param.shape):
            raise ValueError(f"the checkpoint's {key} for {description} has shape {tuple(raw[key].shape)}")
    grams, bases = list(raw["GG"]), list(raw["Q"] or ())
    # a 1-D parameter that is not preconditioned has one empty entry, a 0-D one none
    sizes = tuple(gram.shape[0] if isinstance(gram, Tensor) else None for gram in grams)
    expected = tuple(size if i in layout.modes else None for i, size in enumerate(layout.view_shape))
    if len(sizes) != len(expected) or any(
        have != want and not (want is None and have == 1) for have, want in zip(sizes, expected)
    ):
        raise ValueError(
            f"the checkpoint preconditions {description} with Grams of sizes {sizes}, this optimizer with {expected}: "
            "max_precond_dim, merge_dims, precondition_1d and data_format must be those of the run"
        )
    if [getattr(gram, "shape", None) for gram in grams] != [getattr(basis, "shape", None) for basis in bases]:
        raise ValueError(f"the checkpoint's Q for {description} does not have the shapes of its GG")

    dtype, device = state_dtype(param), param.device
    result: dict[str, Any] = {
        "step": torch.tensor(float(raw["step"]), dtype=torch.float32, device="cpu"),
        "initialized": torch.tensor(True, device="cpu"),
        "exp_avg": torch.empty_like(param, dtype=dtype).copy_(raw["exp_avg"]),
        "exp_avg_sq": torch.empty_like(param, dtype=dtype).copy_(raw["exp_avg_sq"]),
    }
    for mode in layout.modes:
        result[f"gram_{mode}"] = grams[mode].to(dtype=dtype, device=device, copy=True).contiguous()
        result[f"basis_{mode}"] = bases[mode].to(dtype=dtype, device=device, copy=True).contiguous()
    if exp_avg_space == "parameter":
        with torch.no_grad(), full_precision_matmul({param.device.type}):
            turned = project(result["exp_avg"], [result[f"basis_{mode}"] for mode in layout.modes], layout)
            result["exp_avg"].copy_(turned)
    else:
        # The original has a 1 x 1 basis for a mode of size 1, which may be -1; here that mode is the identity.
        for mode, basis in enumerate(bases):
            if mode not in layout.modes and isinstance(basis, Tensor):
                result["exp_avg"].mul_(basis.to(dtype=dtype, device=device).reshape(()).sign())
    return result
