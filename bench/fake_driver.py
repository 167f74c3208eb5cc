"""Whole fused steps through Triton's real JIT on a machine without a GPU: everything but the launch itself.

    python -m bench.fake_driver [--capability 90] [--json FILE]

The interpreter and triton.compile never build the binder that every real launch goes through, so that they cannot see an
argument's name that Triton's launcher does not allow, a specialisation that recompiles, or what a launch costs on the host.
Here the driver answers as a GPU would, kernels are compiled for it (and kept in Triton's cache), and the launch in C does
nothing but what the host looks at afterwards: it counts every gradient as usable. Without Triton's interpreter
(TRITON_INTERPRET), in a process of its own.

Prints how often each kernel was launched with each set of options, and how many variants of it were compiled in each step.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import soap_opt
from soap_opt import functional
from soap_opt.cuda import columns, launch, stepper


class FakeDriver:
    """What Triton asks of a driver until a kernel is launched."""

    def __init__(self, backend: str, arch: int | str, warp_size: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(backend, arch, warp_size)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def count_as_usable(tiles: Tensor, problems: Tensor, scalars: Tensor) -> None:
    """What the first launch of a step writes that the host reads: every parameter was stepped, and t moved.

    tiles [T, 4], problems [R, WIDTH], scalars [P, SCALARS] as in kernels/table.py.
    """
    rows = np.unique(tiles[:, 0].numpy())
    for row in problems.numpy()[rows]:
        if row[columns.STEP] != 0:  # (a row of a Kronecker product has none)
            scalars[row[columns.INDEX], columns.USABLE] = 1.0
            ctypes.c_float.from_address(int(row[columns.STEP])).value += 1.0


def kernels() -> dict[str, Any]:
    """Every kernel of the package by its name."""
    from soap_opt.kernels import gram_ema, project, reexpress

    found = {}
    for module in (gram_ema, project, reexpress):
        found.update({name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")})
    return found


def broken_binders() -> dict[str, str]:
    """Kernels that Triton could not launch, and why: each one's binder is built as its first launch would."""
    from triton.compiler import make_backend
    from triton.runtime.driver import driver
    from triton.runtime.jit import create_function_from_signature

    broken = {}
    for name, kernel in sorted(kernels().items()):
        try:
            create_function_from_signature(kernel.signature, kernel.params, make_backend(driver.active.get_current_target()))
        except SyntaxError as error:
            broken[name] = str(error.msg)
    return broken


class Record:
    """Launches by kernel, and variants compiled, since the last :meth:`take`."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self._compiled = self._variants()

    @staticmethod
    def _variants() -> Counter[str]:
        return Counter({name: len(kernel.device_caches[0][0]) for name, kernel in kernels().items()})

    def take(self) -> tuple[Counter[str], Counter[str]]:
        launches, before = self.launches, self._compiled
        self.launches, self._compiled = Counter(), self._variants()
        return launches, self._compiled - before


@contextlib.contextmanager
def fake_driver(capability: int = 90, counting: bool = True) -> Iterator[Record]:
    """Inside, Triton compiles for a GPU of this capability and launches nothing; ``fused=True`` on a CPU is the Triton path.

    counting: note launches, and do what the host looks at; without it a launch costs what Triton's Python does and no more.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("a fake driver under Triton's interpreter (TRITON_INTERPRET=1) would see nothing compiled")
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.driver import driver

    driver.set_active(FakeDriver("cuda", capability, 32))
    record = Record()

    def nothing(*arguments: Any) -> None:
        pass

    def without_loading(self: CompiledKernel) -> None:
        def run(grid_x, grid_y, grid_z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
            record.launches[self.name] += 1
            if self.name == "project_first_kernel":
                count_as_usable(*arguments[:3])

        self.module, self.function, self._run = None, 0, run if counting else nothing

    with mock.patch.object(CompiledKernel, "_init_handles", without_loading), triton_path_on_cpu():
        yield record


@contextlib.contextmanager
def triton_path_on_cpu() -> Iterator[None]:
    """``fused=True`` takes the Triton path for float32 state on the CPU, and first gradients go as on CUDA."""
    with mock.patch.object(functional, "device_type_of", lambda tensor: "cuda"):
        yield


def watched(around: Callable[[Callable[[], None], Any, Sequence[Any], dict[str, Any]], None]) -> Callable[..., Any]:
    """In place of soap_opt.cuda.launch.kernel_for: each launch becomes ``around(launch, kernel, arguments, constants)``,
    and ``launch()`` makes it."""
    original = launch.kernel_for

    class Watched:
        def __init__(self, kernel: Any, made: Any, constants: dict[str, Any]) -> None:
            self.kernel, self.made, self.constants = kernel, made, constants

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *values: around(lambda: self.made[grid](*values), self.kernel, values, self.constants)

    def kernel_for(kernel: Any, arguments: Sequence[Any], constants: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
        made, values = original(kernel, arguments, constants)
        return Watched(kernel, made, constants), values

    return kernel_for


SHAPES = [(6, 5), (64,), (130, 66), (17, 3, 5, 5), (64, 32, 5, 5), (4,)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capturable": {"capturable": True},
    "recorded": {"capturable": True},  # the last step as into a CUDA graph
    "clipped, normalised": {"max_grad_norm": 1.0, "normalize_grads": True},
    "precision high": {"precision": "high"},
    "adaptive": {"refresh": "adaptive"},
}

MIXED = "groups and dtypes"


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def mixed_groups() -> list[dict[str, Any]]:
    """Three param groups of different options and dtypes."""
    return [
        {"params": parameters(), "lr": 1e-3},
        {"params": parameters(torch.bfloat16), "lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.99)},
        {"params": parameters(torch.float16), "lr": 1e-5, "precondition_frequency": 3},
    ]


def whole_steps(record: Record, steps: int = 8, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """For each set of options what every step launched and compiled."""
    cases: list[tuple[str, Callable[[], Any], dict[str, Any]]] = [
        *((name, parameters, options) for name, options in OPTIONS.items()),
        (MIXED, mixed_groups, {}),
    ]
    rows = []
    for name, make, options in cases:
        if only and name not in only:
            continue
        torch.manual_seed(0)
        optimizer = soap_opt.SOAP(make(), **{"fused": True, "precondition_frequency": 2, **options})
        times = []
        record.take()
        for step in range(steps):
            last = name == "recorded" and step == steps - 1
            start = time.perf_counter()
            with mock.patch.object(stepper, "is_recording", lambda device: True) if last else contextlib.nullcontext():
                optimizer.step()
            times.append(1e3 * (time.perf_counter() - start))
            launches, compiled = record.take()
            rows.append({"case": name, "step": step, "launches": dict(launches), "compiled": dict(compiled)})
        print(f"{name}: host {statistics.median(times[steps // 2 :]):.2f} ms a step; launches of the last {dict(launches)}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fake_driver", description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, default=90, help="of the GPU to compile for: 80, 90 or 100")
    names = [*OPTIONS, MIXED]
    parser.add_argument("--case", action="append", default=[], choices=names, help="only this one (repeatable; default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what every step launched and compiled")
    arguments = parser.parse_args()
    with fake_driver(arguments.capability) as record:
        broken = broken_binders()
        for name, why in broken.items():
            print(f"{name}: no launch is possible: {why}")
        rows = [] if broken else whole_steps(record, only=arguments.case)
    if arguments.json:
        arguments.json.write_text(json.dumps({"broken": broken, "steps": rows}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
