"""Launches of Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .configs import architecture_of, config_of

# (kernel, device, the kernel's constants) -> (the compiled kernel, the constants in the signature's order). Triton's own launch
# compares every global constant of the kernel each time, which takes 60 us: a step of 10 launches would take longer on the host
# than on the GPU.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def kernel_for(kernel: Any, arguments: Sequence[Any], constants: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """A compiled kernel, and ``values``, its constants: ``made[programs, 1, 1](*arguments, *values)`` launches it.

    Args:
        arguments: tensors, the first of them on the device, and int32; their dtypes are the same in every launch of a kernel.
        constants: the kernel's constexprs but DEEP, which comes from its :class:`soap_opt.cuda.configs.Config`.
    """
    name = kernel.__name__
    key = (name, arguments[0].device, *constants.values())
    cached = _compiled.get(key)
    if cached is not None:
        return cached
    interpreted = not hasattr(kernel, "device_caches")
    config = config_of("sm_90" if interpreted else _architecture(), name)
    if config.deep:
        constants = {**constants, "DEEP": config.deep}
    values = tuple(constants[name] for name in kernel.arg_names if name in constants)
    if interpreted:  # Triton's interpreter compiles nothing
        return kernel, values
    made = kernel.warmup(*arguments, **constants, grid=(1,), num_warps=config.warps, num_stages=config.stages)
    _compiled[key] = made, values
    return made, values


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel once, with this many programs. Arguments as of :func:`kernel_for`."""
    made, values = kernel_for(kernel, arguments, constants)
    made[programs, 1, 1](*arguments, *values)


def _architecture() -> str:
    """The architecture that Triton compiles for, as a key of CONFIGS."""
    from triton.runtime.driver import driver  # late: importing soap_opt does not wait for Triton

    target = driver.active.get_current_target()
    return architecture_of(target.backend, target.arch)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` current: Triton launches on the current device, which need not be the one of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
