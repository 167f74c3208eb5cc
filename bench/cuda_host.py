"""What the host does for one step of the fused CUDA path, down to the launch in C, which does nothing, and the original's.

    python -m bench.cuda_host [-o cuda_host]

Needs no GPU, and none was used: tensors are on the CPU, kernels go through Triton's JIT with a driver that only pretends
(bench/fake_driver.py), and what CUDA's calls cost on top is not in it, here for 5 to 9 launches, there for a thousand. The
original's is measured at sizes of at most 2 in place of the model's, where arithmetic is nothing: it is what its PyTorch calls
take on the way to a device.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from soap_opt import SOAP

from .cuda_model import MODELS
from .fake_driver import fake_driver
from .reference import ReferenceSOAP
from .results import Row, save, significant, table

SHAPES = {**MODELS, "2,000 tensors of 4 x 4": lambda: [(4, 4)] * 2000}
NEVER = 10**9  # steps between refreshes: the host's part of those is not looked at


def milliseconds(step: Callable[[], object], rounds: int = 60) -> float:
    times = []
    for _ in range(10 + rounds):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[10:])


def params_of(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def ours(shapes: list[tuple[int, ...]], groups: int = 1) -> float:
    """``groups``: into how many param groups the parameters are dealt out."""
    with fake_driver(counting=False):
        params = params_of(shapes)
        size = -(-len(params) // groups)
        dealt = [{"params": params[i : i + size], "lr": 1e-3 * (i + 1)} for i in range(0, len(params), size)]
        optimizer = SOAP(dealt, fused=True, precondition_frequency=NEVER)
        optimizer.step()
        return milliseconds(optimizer.step)


def original(shapes: list[tuple[int, ...]]) -> float:
    optimizer = ReferenceSOAP(
        params_of([tuple(min(size, 2) for size in shape) for shape in shapes]), precondition_frequency=NEVER
    )
    optimizer.step()
    return milliseconds(optimizer.step, rounds=20)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_host", description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", metavar="NAME", help="write bench/results/NAME.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for model, make in SHAPES.items():
        shapes = make()
        if sum(torch.Size(shape).numel() for shape in shapes) > 2e7:
            shapes = [tuple(min(size, 64) for size in shape) for shape in shapes]  # the host's work is that of any size
        times = {"ours_ms": ours(shapes), "ours_in_4_groups_ms": ours(shapes, 4), "original_ms": original(shapes)}
        rows.append({"model": model, "tensors": len(shapes), **{name: significant(ms) for name, ms in times.items()}})
        print(table(rows[-1:]), flush=True)
    if arguments.output:
        print(save(arguments.output, rows).name)


if __name__ == "__main__":
    main()
