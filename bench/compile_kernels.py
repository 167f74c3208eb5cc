"""Compile every variant of the Triton kernels that a plan can choose, without a GPU, and write down what ptxas made of it.

``python -m bench.compile_kernels [-o bench/results/kernels.csv] [TARGET ...]``, with the installed Triton; the file keeps the
rows of other versions. NVIDIA's figures are read from the cubin by
the cuobjdump of Triton's wheel and counted in the PTX, AMD's registers are in the assembly's own notes. Kernels go through
Triton's JIT with a driver that only pretends (bench/fake_driver.py), so that what is compiled here is what a launch compiles,
and stands in Triton's cache for both.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
import triton.language as tl
from triton.runtime.driver import driver

from soap_opt.cuda import configs
from soap_opt.cuda.columns import DTYPES
from soap_opt.kernels.gram_ema import gram_ema_kernel
from soap_opt.kernels.project import project_adam_kernel, project_apply_kernel, project_first_kernel, project_kernel
from soap_opt.kernels.reexpress import due_kernel, reexpress_kernel

from .fake_driver import FakeDriver

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

# What a block may use: registers of a thread (gfx942: 512 of a lane), shared memory in bytes
LIMITS = {"sm_80": (255, 163 << 10), "sm_90": (255, 227 << 10), "sm_100": (255, 227 << 10), "gfx942": (512, 64 << 10)}

INTEGERS = {"tiles": torch.int32, "problems": torch.int64, "counters": torch.int32, "units": torch.int64, "due": torch.uint8}


def variants(backend: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each kernel with each set of its constants that soap_opt.cuda.plan can ask for."""
    for dtype in DTYPES:
        yield gram_ema_kernel, {"GRAD": dtype, "PRECISION": configs.PRECISION[backend]}
    yield reexpress_kernel, {"PRECISION": configs.PRECISION[backend]}
    yield due_kernel, {}
    for precision in dict.fromkeys((configs.PRECISION[backend], configs.HIGH_PRECISION[backend])):
        for dtype in DTYPES:
            yield project_first_kernel, {"GRAD": dtype, "PRECISION": precision}
        for back in (False, True):
            yield project_kernel, {"BACK": back, "PRECISION": precision}
        yield project_adam_kernel, {"PRECISION": precision}
        yield project_apply_kernel, {"PRECISION": precision}


def config_of(kernel: Any, target: str) -> configs.Config:
    backend, arch, _ = TARGETS[target]
    return configs.config_of(configs.architecture_of(backend, arch), kernel.__name__)


def compiled(kernel: Any, constants: dict[str, Any], target: str, config: configs.Config | None = None) -> Any:
    """What the JIT makes of a kernel. config: that of the target unless given."""
    config = config or config_of(kernel, target)
    values = {name: getattr(tl, value) if name == "GRAD" else value for name, value in constants.items()}
    if config.deep:
        values["DEEP"] = config.deep
    arguments = [0 if name == "count" else INTEGERS.get(name, torch.float32) for name in kernel.arg_names if name not in values]
    before = driver._active
    driver.set_active(FakeDriver(*TARGETS[target]))
    kernel.device_caches.pop(0, None)  # the binder that was made for another target
    try:
        return kernel.warmup(*arguments, grid=(1,), **values, num_warps=config.warps, num_stages=config.stages)
    finally:
        kernel.device_caches.pop(0, None)
        driver._active = before


def cuobjdump(binary: Any, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def figures(binary: Any) -> dict[str, int]:
    """Registers of a thread, bytes of a thread's stack (what is spilled lies there), bytes of shared memory."""
    if "cubin" in binary.asm:
        text = cuobjdump(binary, "-res-usage")
        registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    else:
        text = binary.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count: +(\d+)", text)[1])  # accumulation registers included
        stack = int(re.search(r"\.private_segment_fixed_size: +(\d+)", text)[1])
    return {"registers": registers, "stack_bytes": stack, "shared_bytes": binary.metadata.shared}


def widths(ptx: str) -> Counter[str]:
    """How often the PTX has each kind of access to global memory, by its bytes: "copy" (asynchronously into shared memory),
    "load" and "store", as "load 16"."""
    found: Counter[str] = Counter()
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x\w+|\d+)", ptx):
        found[f"copy {int(size, 0)}"] += 1
    for what, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.[a-z]\w*)*?(?:\.v(\d))?\.[bfsu](\d+)", ptx):
        found[f"{'load' if what == 'ld' else 'store'} {int(vector or 1) * int(bits) // 8}"] += 1
    return found


def in_ptx(binary: Any) -> dict[str, int | str]:
    """What the PTX has of wide accesses (16 bytes), warpgroup and warp products, and barriers; empty for AMD."""
    if "ptx" not in binary.asm:
        return dict.fromkeys(("copies_16", "loads_16", "stores_16", "wgmma", "mma", "barriers"), "")
    ptx = binary.asm["ptx"]
    of = widths(ptx)
    return {
        "copies_16": of["copy 16"],
        "loads_16": of["load 16"],
        "stores_16": of["store 16"],
        "wgmma": len(re.findall(r"\bwgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "barriers": len(re.findall(r"\bbar\.(?:warp\.)?sync|\bbarrier\.sync", ptx)),
    }


def in_sass(binary: Any) -> dict[str, int | str]:
    """What the machine code has: instructions in all, and of the loops with matrix products (one for each class of tiles) how
    many there are, their instructions and their barriers of a block, both on average; empty for AMD."""
    columns = ("instructions", "loops", "loop_instructions", "loop_barriers")
    if "cubin" not in binary.asm:
        return dict.fromkeys(columns, "")
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]+);", cuobjdump(binary, "-sass"))]
    places = {at: place for place, (at, _) in enumerate(code)}
    loops = []
    for place, (_, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        first = places.get(int(target[1], 16)) if target else None
        if first is not None and first <= place and any("MMA" in instruction for _, instruction in code[first : place + 1]):
            loops.append((first, place))  # backwards
    inner = [one for one in loops if not any(one != other and one[0] <= other[0] and other[1] <= one[1] for other in loops)]
    sizes = [last + 1 - first for first, last in inner]
    barriers = [sum("BAR.SYNC" in text for _, text in code[first : last + 1]) for first, last in inner]
    means = [round(sum(column) / max(1, len(inner))) for column in (sizes, barriers)]
    return dict(zip(columns, (len(code), len(inner), *means)))


def named(kernel: Any, constants: dict[str, Any]) -> dict[str, str]:
    return {
        "kernel": kernel.__name__,
        "grad": constants.get("GRAD", ""),
        "back": str(constants.get("BACK", "")),
        "precision": constants.get("PRECISION", ""),
    }


def named_variants(target: str) -> list[dict[str, str]]:
    return [named(*variant) for variant in variants(TARGETS[target][0])]


def rows(targets: list[str]) -> Iterator[dict[str, Any]]:
    for name in targets:
        for kernel, constants in variants(TARGETS[name][0]):
            binary = compiled(kernel, constants, name)
            yield {
                "target": name,
                **named(kernel, constants),
                **config_of(kernel, name)._asdict(),
                **figures(binary),
                **in_ptx(binary),
                **in_sass(binary),
                "triton": triton.__version__,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "kernels.csv")
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}")
    options = parser.parse_args()
    result = []
    for row in rows(options.targets):
        print(*row.values(), flush=True)
        result.append(row)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.output.exists():  # rows of other versions of Triton stay
        with options.output.open() as file:
            result = [row for row in csv.DictReader(file) if row["triton"] != triton.__version__] + result
    result.sort(key=lambda row: [int(part) for part in row["triton"].split(".")], reverse=True)  # the latest first
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(result[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(result)


if __name__ == "__main__":
    main()
