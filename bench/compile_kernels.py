"""Compile every variant of the Triton kernels that a plan can choose, without a GPU, and write down what ptxas made of it.

``python -m bench.compile_kernels [-o bench/results/kernels.csv]``. NVIDIA's figures are read from the cubin by the cuobjdump
of Triton's wheel, AMD's from the assembly's own notes.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from soap_opt.kernels.gram_ema import gram_ema_kernel
from soap_opt.kernels.project import project_adam_kernel, project_apply_kernel, project_first_kernel, project_kernel
from soap_opt.kernels.reexpress import due_kernel, reexpress_kernel
from soap_opt.launch import DTYPES, HIGH_PRECISION, PRECISION, STAGES, WARPS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# What a block may use: registers of a thread (sm: 65,536 / 256 threads; gfx942: 512 of a lane), shared memory in bytes
LIMITS = {"sm_80": (255, 163 << 10), "sm_90": (255, 227 << 10), "sm_100": (255, 227 << 10), "gfx942": (512, 64 << 10)}

ARGUMENTS = {
    **{"tiles": "*i32", "problems": "*i64", "scalars": "*fp32", "partials": "*fp32", "counters": "*i32"},
    **{"group_options": "*fp32", "grad_scale": "*fp32", "found_inf": "*fp32", "units": "*i64", "due": "*u8", "count": "i32"},
}


def variants(backend: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each kernel with each set of its constants that soap_opt.fused_cuda can ask for."""
    for dtype in DTYPES:
        yield gram_ema_kernel, {"GRAD": dtype, "PRECISION": PRECISION[backend]}
    yield reexpress_kernel, {"PRECISION": PRECISION[backend]}
    yield due_kernel, {}
    for precision in dict.fromkeys((PRECISION[backend], HIGH_PRECISION[backend])):
        for dtype in DTYPES:
            yield project_first_kernel, {"GRAD": dtype, "PRECISION": precision}
        for back in (False, True):
            yield project_kernel, {"BACK": back, "PRECISION": precision}
        yield project_adam_kernel, {"PRECISION": precision}
        yield project_apply_kernel, {"PRECISION": precision}


def compiled(kernel: Any, constants: dict[str, Any], target: GPUTarget) -> Any:
    values = {name: getattr(tl, value) if name == "GRAD" else value for name, value in constants.items()}
    signature = {name: "constexpr" if name in values else ARGUMENTS[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    return triton.compile(source, target=target, options={"num_warps": WARPS[target.backend], "num_stages": STAGES})


def figures(binary: Any) -> dict[str, int]:
    """Registers of a thread, bytes of a thread's stack (what is spilled lies there), bytes of shared memory."""
    if "cubin" in binary.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
            text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    else:
        text = binary.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count: +(\d+)", text)[1])  # accumulation registers included
        stack = int(re.search(r"\.private_segment_fixed_size: +(\d+)", text)[1])
    return {"registers": registers, "stack_bytes": stack, "shared_bytes": binary.metadata.shared}


def named(kernel: Any, constants: dict[str, Any]) -> dict[str, str]:
    return {
        "kernel": kernel.__name__,
        "grad": constants.get("GRAD", ""),
        "back": str(constants.get("BACK", "")),
        "precision": constants.get("PRECISION", ""),
    }


def named_variants(target: str) -> list[dict[str, str]]:
    return [named(*variant) for variant in variants(TARGETS[target].backend)]


def rows(targets: list[str]) -> Iterator[dict[str, Any]]:
    for name in targets:
        target = TARGETS[name]
        for kernel, constants in variants(target.backend):
            yield {
                "target": name,
                **named(kernel, constants),
                "warps": WARPS[target.backend],
                **figures(compiled(kernel, constants, target)),
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
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(result[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(result)


if __name__ == "__main__":
    main()
