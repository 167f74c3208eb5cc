"""The launch of a kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .configs import architecture_of, config_of

# (kernel, device, its constants) -> (what Triton compiled, the constants in the signature's order). Triton's own launch
# compares every global constant of the kernel each time: 60 us, and a step of 10 launches would be longer on the host than on
# the GPU.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int], *arguments: Any, **constants: Any) -> None:
    """Every launch of the fused step goes through here.

    Args:
        arguments: tensors, the first of them on the device, and int32; their dtypes are the same in every launch of a kernel.
        constants: the kernel's constexprs but DEEP, which its :class:`soap_opt.cuda.configs.Config` says.
    """
    name = kernel.__name__
    key = (name, arguments[0].device, *constants.values())
    known = _compiled.get(key)
    if known is not None:
        compiled, values = known
        compiled[grid[0], 1, 1](*arguments, *values)
        return
    config = config_of(_architecture(kernel), name)
    if config.deep:
        constants["DEEP"] = config.deep
    compiled = kernel[grid](*arguments, **constants, num_warps=config.warps, num_stages=config.stages)
    if compiled is not None:  # (Triton's interpreter compiles nothing)
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names if name in constants)


def _architecture(kernel: Any) -> str:
    """What Triton compiles the kernel for; under its interpreter, which compiles nothing, any."""
    if not hasattr(kernel, "device_caches"):
        return "sm_90"
    from triton.runtime.driver import driver  # late: importing soap_opt does not wait for Triton

    target = driver.active.get_current_target()
    return architecture_of(target.backend, target.arch)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
