"""The checks of parameters that join a group, and the estimated cost of their first step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from .gradients import state_dtype
from .layout import layout_of, outside_modes
from .options import SHAPING

# A longer first step gets a warning: nobody expects an optimizer's first step to take so long.
LONG_FIRST_STEP = 5.0  # seconds

# Larger modes get a warning on devices other than a CPU, where the time of a decomposition is not known
LARGE_MODE = 4096

_MEASURED = 512


def check_params(params: Sequence[Any], describe: Callable[[int], str]) -> None:
    """Refuse parameters that SOAP cannot step.

    Args:
        params: tensors or (name, tensor), as in a param group.
        describe: names the parameter at an index of params.

    Raises:
        RuntimeError: complex parameters.
        TypeError: DTensor parameters.
        ValueError: a parameter stands twice in the group.
    """
    seen: dict[int, int] = {}
    for place, param in enumerate(params):
        tensor = param[1] if isinstance(param, tuple) else param
        if not isinstance(tensor, Tensor):
            continue  # torch raises its own error
        if tensor.is_complex():
            raise RuntimeError(f"SOAP does not support complex parameters, but {describe(place)} is {tensor.dtype}")
        if is_dtensor(tensor):
            raise TypeError(
                f"SOAP does not support DTensor parameters yet, and {describe(place)} is one (FSDP2's fully_shard and tensor "
                "parallelism make them): a Gram needs whole rows and columns of a gradient. Train with "
                "DistributedDataParallel, or let another optimizer step the sharded parameters"
            )
        if id(tensor) in seen:
            raise ValueError(
                f"{describe(place)} stands in its param group a second time, first as {describe(seen[id(tensor)])}: SOAP steps "
                "each parameter once; leave one of them out"
            )
        seen[id(tensor)] = place


def describe_place(params: Sequence[Any], before: int, place: int) -> str:
    """'parameter 3 (layer.weight) of shape (4, 4)'. params: of one group; before: number of parameters in earlier groups."""
    param = params[place]
    name, tensor = (f" ({param[0]})", param[1]) if isinstance(param, tuple) else ("", param)
    shape = "not known yet" if is_lazy(tensor) else tuple(tensor.shape)
    return f"parameter {before + place}{name} of shape {shape}"


def is_dataless(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no numbers: on the device "meta", or made under FakeTensorMode."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def is_dtensor(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # without this module there are no DTensors
    return module is not None and isinstance(tensor, module.DTensor)


def first_step_costs(
    params: Sequence[Any], group: dict[str, Any], cubes: int, describe: Callable[[int], str]
) -> tuple[int, str | None]:
    """The cost of the eigendecompositions of a group's first step, and a warning where the first step of all groups so far will
    take seconds. Only the group that brings the time above the limit gets the warning.

    Args:
        params: tensors or (name, tensor).
        group: the group's options, complete.
        cubes: sum of d^3 over the Grams on the CPU of all groups before.
        describe: names the parameter at an index of params.

    Returns:
        cubes with this group's Grams added, and the text of the warning or None.
    """
    tensors = [param[1] if isinstance(param, tuple) else param for param in params]
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    shaping = {name: group[name] for name in SHAPING}
    sizes = [
        (size, place)
        for place, param in enumerate(tensors)
        if not is_lazy(param)
        for size in layout_of(tuple(param.shape), tuple(range(param.dim())), **shaping).sizes
    ]
    more = cubes + sum(size**3 for size, place in sizes if tensors[place].device.type == "cpu")
    seconds = first_step_seconds(more)
    if seconds > LONG_FIRST_STEP and not first_step_seconds(cubes) > LONG_FIRST_STEP:
        duration = f"about {seconds:.0f} s on this machine"
    elif any(size > LARGE_MODE and tensors[place].device.type != "cpu" for size, place in sizes):
        duration = "much time"
    else:
        return more, None
    size, place = max(sizes)
    bytes_of_state = sum(2 * d * d * state_dtype(tensors[owner]).itemsize for d, owner in sizes)
    return more, (
        f"SOAP's first step will take {duration}: of {len(sizes)} Grams to decompose the largest is the {size} x {size} matrix "
        f"for {describe(place)}; Grams and bases are {bytes_of_state >> 20} MiB of state. max_precond_dim below "
        f"{size} leaves such modes alone" + (", so does merge_dims=False" if group["merge_dims"] else "")
    )


def first_step_seconds(cubes: int) -> float:
    """Estimated seconds of eigendecompositions on this machine's CPU; 0 if few. cubes: sum of d^3 over the Grams."""
    if cubes < 1500.0**3:
        return 0.0
    # On larger matrices LAPACK's eigh reaches about twice its speed at the measured size
    return 0.6 * _seconds_of_eigh(torch.get_num_threads()) * cubes / _MEASURED**3


@lru_cache
def _seconds_of_eigh(threads: int) -> float:
    """Seconds that eigh takes for one [512, 512] float32 matrix: some hundredths."""
    with outside_modes(), torch.random.fork_rng(devices=[]), torch.no_grad():
        x = torch.randn(_MEASURED, _MEASURED, dtype=torch.float32, device="cpu")
        gram = x @ x.T
        torch.linalg.eigh(gram)  # the first call loads libraries and starts threads
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            torch.linalg.eigh(gram)
            seconds.append(time.perf_counter() - start)
        return min(seconds)  # other load on the machine is no reason to warn
