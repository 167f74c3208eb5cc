"""Options of a param group: what is checked, what an older state lacks, and what a step wants to know of them."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from torch import Tensor

from .fused_cuda import SCRATCH_LIMIT
from .refresh import POLICIES, tolerance_of

# Options that decide the shapes, or the meaning, of what is in the state
LAYOUT_OPTIONS = ("max_precond_dim", "merge_dims", "precondition_1d", "data_format")

REFUSED = {
    "amsgrad": "the running maximum of v would mix coordinates of different eigenbases after every refresh",
    "decoupled_weight_decay": "weight decay is always decoupled here, as with AdamW; leave it out",
    "differentiable": "a step through eigh and QR of nearly equal eigenvalues has no usable derivative",
}

# Options that state written by an older version may lack, for objects unpickled from one
ADDED_DEFAULTS: dict[str, Any] = {
    "shampoo_beta": None,
    "data_format": "channels_first",
    "refresh": "staggered",
    "refresh_tolerance": 0.01,
    "refresh_start": 0,
    "maximize": False,
    "max_grad_norm": None,
    "precision": "highest",
    "overlap_refresh": True,
    "scratch_limit": SCRATCH_LIMIT,
    "capturable": False,
    "foreach": None,
    "fused": None,
}


LARGEST_LR = 3.4e38  # what float32 holds


def check_options(options: dict[str, Any]) -> None:
    """Check the options of a param group, in torch's wording; raises ValueError (RuntimeError for foreach with fused)."""
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        lr = float(lr) if lr.device.type == "cpu" else 0.0  # the host does not wait for a device to hear its value
    if not 0.0 <= lr <= LARGEST_LR:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0.0 <= options["eps"]:
        raise ValueError(f"Invalid epsilon value: {options['eps']}")
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas}")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            raise ValueError(f"betas must be floats, but index {i} is a Tensor: {beta}")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if not 0.0 <= options["weight_decay"]:
        raise ValueError(f"Invalid weight_decay value: {options['weight_decay']}")
    beta = options["shampoo_beta"]
    if beta is not None and not beta < 1.0:
        raise ValueError(f"Invalid shampoo_beta value: {beta}")
    for name, least in (("precondition_frequency", 1), ("max_precond_dim", 0), ("refresh_start", 0), ("scratch_limit", 0)):
        if isinstance(options[name], bool) or not isinstance(options[name], Integral) or options[name] < least:
            raise ValueError(f"Invalid {name} value: {options[name]} (an integer of at least {least})")
    if options["data_format"] not in ("channels_first", "channels_last"):
        raise ValueError(f"Invalid data_format: {options['data_format']!r} (channels_first or channels_last)")
    if options["refresh"] not in POLICIES:
        raise ValueError(f"Invalid refresh policy: {options['refresh']!r} (one of {', '.join(POLICIES)})")
    if not 0.0 <= options["refresh_tolerance"]:
        raise ValueError(f"Invalid refresh_tolerance value: {options['refresh_tolerance']}")
    if options["max_grad_norm"] is not None and not 0.0 < options["max_grad_norm"]:
        raise ValueError(f"Invalid max_grad_norm value: {options['max_grad_norm']}")
    if options["precision"] not in ("highest", "high"):
        raise ValueError(f"Invalid precision: {options['precision']!r} (highest or high)")
    if options["foreach"] and options["fused"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def shampoo_beta(group: dict[str, Any]) -> float:
    beta = group["shampoo_beta"]
    return group["betas"][1] if beta is None or beta < 0 else beta


def step_options(group: dict[str, Any], clip: bool) -> dict[str, Any]:
    """What :func:`soap_opt.functional.soap` wants to know of a group, whatever implementation runs."""
    beta1, beta2 = group["betas"]
    names = (
        "lr eps weight_decay precondition_frequency normalize_grads correct_bias refresh refresh_tolerance maximize"
    ).split()
    return {
        **{name: group[name] for name in names},
        "beta1": beta1,
        "beta2": beta2,
        "shampoo_beta": shampoo_beta(group),
        "max_grad_norm": group["max_grad_norm"] if clip else None,
    }


def list_kind(group: dict[str, Any]) -> tuple[Any, ...]:
    """What groups must agree in to be stepped together by the C++ engine or the multi-tensor path: all that a step wants to
    know but lr and weight_decay, which every parameter may have of its own."""
    names = (
        "shampoo_beta eps precondition_frequency normalize_grads correct_bias refresh refresh_tolerance maximize foreach fused"
    ).split()
    return (*group["betas"], *(group[name] for name in names))


def step_kind(group: dict[str, Any]) -> tuple[Any, ...]:
    """What groups must agree in to be stepped together on CUDA: everything that GroupOptions does not hold for each of them,
    and what is passed over when due, since one call refreshes all. The last is scratch_limit."""
    names = ("precision", "overlap_refresh", "capturable", "scratch_limit")
    return tolerance_of(group["refresh"], group["refresh_tolerance"]), *(group[name] for name in names)
