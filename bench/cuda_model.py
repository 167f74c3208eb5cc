"""Count what one steady step moves and computes on a GPU, from the launch plan and from the original's operations.

``python -m bench.cuda_model [-o bench/results/cuda_model.csv]``. Needs no GPU, and none was used: these are counts, and times
that follow from them, not measurements.

What is counted. *Bytes*: what a launch must read and write in device memory if the caches are ideal inside a launch and empty
between two. ``tensor_bytes`` are those of tensors of a parameter's size (gradient, scratch, m, v, p); ``matrix_bytes`` those of
Grams, bases and their partial sums. *Flops*: 2 for each multiply-add that a tile executes, padding included; U = 2 numel
sum(d_i) of one pass over all modes, of which a step needs 2.5.

Two times. ``h100_floor_us`` is what an H100's published limits would allow. ``h100_model_us`` is what our programs as they are
compiled should take: their instructions and barriers (bench/results/kernels.csv, straight code and loops by the number of
iterations), issued by four schedulers a multiprocessor, as many programs at a time as registers and shared memory hold. It is
there to be compared with a measurement, launch by launch: what is off by more than the rest is where to look.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from soap_opt.cuda import columns, configs, problems
from soap_opt.cuda.columns import TILES
from soap_opt.cuda.tables import Kinds, Tables, make_tables
from soap_opt.layout import Layout, layout_of

from .reference import ReferenceSOAP
from .results import environment

# H100 SXM: memory, TF32 tensor cores without sparsity (a float32 product takes three), time to launch a kernel
H100 = {"bytes_per_second": 3.35e12, "float32_flops_per_second": 494e12 / 3, "seconds_per_launch": 3e-6}

# Of its 132 multiprocessors at 1.755 GHz: schedulers, registers, bytes of shared memory (a block takes 1 KiB more than it asks)
MULTIPROCESSORS, CLOCK, SCHEDULERS, REGISTERS, SHARED = 132, 1.755e9, 4, 65536, 228 << 10
# Assumed, for a program that has a multiprocessor to itself: cycles from one instruction of a warp to its next, of a barrier,
# and of a load from the L2 cache, of which three wait for each other (tile, row, first element) and one comes at the end
CYCLES_PER_INSTRUCTION, CYCLES_PER_BARRIER, CYCLES_PER_LOAD, LOADS = 2.5, 40, 600, 4

KERNELS = Path(__file__).parent / "results" / "kernels.csv"

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def hyperprior_shapes() -> list[tuple[int, ...]]:
    """bmshj2018-hyperprior, quality 3, without ``.quantiles``."""
    from compressai.zoo import image_models

    net = image_models["bmshj2018-hyperprior"](quality=3, pretrained=False)
    return [tuple(p.shape) for name, p in net.named_parameters() if not name.endswith(".quantiles")]


def gpt2_small_shapes() -> list[tuple[int, ...]]:
    """GPT-2 small: 12 blocks of width 768, vocabulary 50,257 (above max_precond_dim), tied head."""
    block = [
        (768,),
        (768,),
        (2304, 768),
        (2304,),
        (768, 768),
        (768,),
        (768,),
        (768,),
        (3072, 768),
        (3072,),
        (768, 3072),
        (768,),
    ]
    return [(50257, 768), (1024, 768), *(block * 12), (768,), (768,)]


def layouts_of(shapes: Sequence[tuple[int, ...]]) -> list[Layout]:
    options = {"max_precond_dim": 10000, "merge_dims": False, "precondition_1d": False, "data_format": "channels_first"}
    return [layout_of(shape, tuple(range(len(shape))), **options) for shape in shapes]


def launches_of(tables: Tables, layouts: Sequence[Layout], grad: str = "float32") -> list[dict[str, Any]]:
    """One row for each launch of the plan: programs, flops, bytes."""
    result = []
    for each in tables.launches:
        tiles = tables.tiles[each.first : each.first + each.count]
        row: dict[str, Any] = {"launch": each.kernel, "programs": each.count, "flops": 0, "tensor_bytes": 0, "matrix_bytes": 0}
        row["iterations"] = []  # (programs, iterations of each)
        grams = set()
        for (problem, kind), programs in Counter(zip(tiles[:, 0].tolist(), tiles[:, 1].tolist())).items():
            values = tables.problems[problem]
            numel = layouts[values[columns.INDEX]].numel
            if each.kernel == "gram_ema" and kind < columns.NORM:
                tile, splits = TILES[kind // 4], int(values[columns.COUNT])
                depth, factors = int(values[columns.DEPTH]), int(values[columns.FACTOR_COUNT])
                deep = problems.gram_deep(kind // 4)
                iterations = math.ceil(int(values[columns.COLUMNS]) / deep)
                row["iterations"].append((programs, math.ceil(iterations / splits)))
                row["flops"] += 2 * programs // splits * tile.wide**2 * iterations * deep
                # both panels of a tile and all modes of a parameter read the same gradient in one launch
                if values[columns.INDEX] not in grams:
                    row["tensor_bytes"] += SIZES[grad] * numel
                    grams.add(values[columns.INDEX])
                kept = [int(values[columns.FACTORS + 2 * i + 1]) for i in range(factors)]
                row["matrix_bytes"] += 6 * sum(size**2 for size in kept)  # the lower triangle is read, all is written
                if splits > 1 or factors > 1:
                    row["matrix_bytes"] += 8 * programs * tile.wide**2
            elif kind < columns.NORM:
                tile = TILES[kind // 4]
                depth = int(values[columns.DEPTH])
                deep = configs.CONFIGS["sm_90"][kernel_of(each.kernel)].deep
                row["iterations"].append((programs, math.ceil(depth / deep)))
                row["flops"] += 2 * programs * tile.wide * tile.long * math.ceil(depth / deep) * deep
                read = SIZES[grad] if each.kernel == "project_first" else 4
                written = {"project_adam": 4 + 16, "project_apply": 8}.get(each.kernel, 4)  # u, m and v; p
                row["tensor_bytes"] += (read + written) * numel
                row["matrix_bytes"] += 4 * depth**2
            elif kind == columns.KRONECKER:
                row["iterations"].append((programs, 0))
                row["matrix_bytes"] += 4 * int(values[columns.DEPTH]) ** 2
            else:
                cost = {columns.NORM: SIZES[grad], columns.COPY: SIZES[grad] + 4, columns.ADAM_GRAD: SIZES[grad] + 24,
                        columns.ADAM_SCRATCH: 4 + 20, columns.APPLY: 12}  # fmt: skip
                row["iterations"].append((programs, 0))
                row["tensor_bytes"] += cost[kind] * numel
        result.append(row)
    return result


def kernel_of(name: str) -> str:
    """The kernel of a launch of the plan."""
    return "project" if name == "back" else name


@lru_cache
def compiled_kernels() -> dict[str, dict[str, int]]:
    """What the compiler made of each kernel for an H100, for float32 gradients at precision "highest"."""
    found = {}
    with KERNELS.open() as file:
        rows = [row for row in csv.DictReader(file) if row["target"] == "sm_90"]
    # of the installed Triton, or of the latest that there are figures of
    installed = environment()["triton"]
    version = installed if any(row["triton"] == installed for row in rows) else rows[0]["triton"]
    for row in rows:
        if row["triton"] == version and row["precision"] != "tf32" and row["grad"] in ("", "float32"):
            numbers = {key: int(value) for key, value in row.items() if value.isdecimal()}
            found[row["kernel"].removesuffix("_kernel")] = numbers
    return found


def program_seconds(name: str, iterations: Sequence[tuple[int, int]]) -> float:
    """What a launch's programs take, memory's bandwidth aside. iterations: (programs, iterations of each)."""
    kernel = compiled_kernels()[kernel_of(name)]
    threads = 32 * kernel["warps"]
    resident = min(REGISTERS // (threads * kernel["registers"]), SHARED // (kernel["shared_bytes"] + 1024), 2048 // threads)
    loop, barriers = kernel["loop_instructions"], kernel["loop_barriers"]
    # outside of the loops a program runs one class of tiles of about ten branches
    straight = (kernel["instructions"] - kernel["loops"] * loop) / (kernel["loops"] + 2)
    issued = occupied = longest = 0.0
    for programs, count in iterations:
        instructions = straight + count * loop
        alone = instructions * CYCLES_PER_INSTRUCTION + count * barriers * CYCLES_PER_BARRIER + LOADS * CYCLES_PER_LOAD
        issued += programs * instructions * kernel["warps"] / SCHEDULERS
        occupied += programs * alone / resident
        longest = max(longest, alone)
    return max(issued / MULTIPROCESSORS, occupied / MULTIPROCESSORS, longest) / CLOCK


class _Count(TorchDispatchMode):
    """Every operator that is not a view as one launch: its tensors' bytes, and the flops of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.flops = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        nothing_runs = (torch.ops.aten.detach, torch.ops.aten._unsafe_view)
        if func.namespace == "aten" and not func.is_view and func.overloadpacket not in nothing_runs:
            self.launches += 1
            touched = [*args, *(kwargs or {}).values(), *(out if isinstance(out, (tuple, list)) else [out])]
            self.bytes += sum(x.numel() * x.element_size() for x in touched if isinstance(x, torch.Tensor))
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
                self.flops += 2 * args[0].numel() * args[1].shape[-1]
        return out


def original_of(shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """A steady step of bench/reference.py, which makes the original's passes, run on tensors without data."""
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer = ReferenceSOAP(params)
        optimizer.step()
        with _Count() as count:
            optimizer.step()
    return {"launch": "all", "launches": count.launches, "flops": count.flops, "bytes": count.bytes}


def seconds(launches: int, flops: float, moved: float) -> float:
    """The longest of what memory and tensor cores would take at their published limits, and the launches."""
    return (
        max(moved / H100["bytes_per_second"], flops / H100["float32_flops_per_second"]) + launches * H100["seconds_per_launch"]
    )


def model(name: str, shapes: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
    """Rows for one model: each of our launches, their sum, the original's sum, fused Adam's."""
    layouts = layouts_of(shapes)
    numel = sum(layout.numel for layout in layouts)
    needed = 2.5 * sum(2 * layout.numel * sum(layout.sizes) for layout in layouts)
    tables = make_tables(Kinds.of(layouts), [True] * len(layouts))
    own = [{"implementation": "soap_opt", "launches": 1, **row} for row in launches_of(tables, layouts)]
    total = {key: sum(row[key] for row in own) for key in ("launches", "programs", "flops", "tensor_bytes", "matrix_bytes")}
    adam = {"launch": "all", "launches": 1, "flops": 0, "bytes": 28 * numel}
    result = [
        *own,
        {"implementation": "soap_opt", "launch": "all", **total},
        {"implementation": "original SOAP", **original_of(shapes)},
        {"implementation": "torch.optim.Adam(fused=True)", **adam},
    ]
    for row in result:
        if "bytes" not in row:
            row["bytes"] = row["tensor_bytes"] + row["matrix_bytes"]
            row["tensor_bytes_per_parameter"] = round(row["tensor_bytes"] / numel, 1)
            row["matrix_bytes_per_parameter"] = round(row["matrix_bytes"] / numel, 1)
        row["bytes_per_parameter"] = round(row["bytes"] / numel, 1)
        row["flops_per_2.5U"] = round(row["flops"] / needed, 3)
        row["h100_floor_us"] = round(1e6 * seconds(row["launches"], row["flops"], row["bytes"]), 1)
    for row in own:  # of its launches, the longer of what memory and the programs take
        busy = max(row["bytes"] / H100["bytes_per_second"], program_seconds(row["launch"], row["iterations"]))
        row["h100_model_us"] = round(1e6 * (busy + H100["seconds_per_launch"]), 1)
    result[len(own)]["h100_model_us"] = round(sum(row["h100_model_us"] for row in own), 1)
    return [{"model": name, "parameters": numel, "tensors": len(layouts), **row} for row in result]


MODELS = {"bmshj2018-hyperprior q3": hyperprior_shapes, "GPT-2 small": gpt2_small_shapes}

COLUMNS = (
    "model parameters tensors implementation launch launches programs flops flops_per_2.5U bytes bytes_per_parameter "
    "tensor_bytes_per_parameter matrix_bytes_per_parameter h100_floor_us h100_model_us"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "cuda_model.csv")
    options = parser.parse_args()
    rows = [row for name, shapes in MODELS.items() for row in model(name, shapes())]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(options.output.read_text(), end="")


if __name__ == "__main__":
    main()
