"""What is still to be built: the extensions where the prepared ones do not load, the kernels that Triton's cache does not hold.

    python -m bench.first_hour.build [--device cpu --quick]

Kernels are compiled side by side, one on each core, by the JIT with a driver that only pretends (bench/compile_kernels.py):
what the stages launch is then found in the cache, and none of their seconds go into compiling.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from soap_opt import _ext
from soap_opt.cuda.configs import HIGH_PRECISION

from .. import compile_kernels
from .common import Compilations, make_parser, same_hashes, say_key

TARGET = "sm_90"


def extensions() -> str:
    """Build them for the GPU that is here, unless they load."""
    if _ext._load_error is None and _ext._cuda_load_error is None:
        return "extensions load"
    print(f"CPU engine: {_ext._load_error}\nCUDA refresh: {_ext._cuda_load_error}", flush=True)
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    environment = {"SOAP_OPT_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability, "MAX_JOBS": str(os.cpu_count())}
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], env={**os.environ, **environment})
    return f"extensions {'built' if done.returncode == 0 else 'NOT built'}"


def chosen(arguments: argparse.Namespace) -> list[int]:
    """Numbers of the variants: all, or those of plain float32 steps."""

    def is_plain(constants: dict) -> bool:
        return constants.get("GRAD", "float32") == "float32" and constants.get("PRECISION") != HIGH_PRECISION["cuda"]

    everything = list(compile_kernels.variants("cuda"))
    return [i for i, (_, each) in enumerate(everything) if arguments.all or not arguments.quick or is_plain(each)]


def compile_variant(number: int) -> tuple[str, int, int]:
    """Its name; how often it was found in the cache and how often not. (In a process of its own.)"""
    compilations = Compilations()
    same_hashes()
    kernel, constants = list(compile_kernels.variants("cuda"))[number]
    compile_kernels.compiled(kernel, constants, TARGET)
    return f"{kernel.__name__} {constants}", compilations.hits, compilations.misses


def kernels(numbers: list[int]) -> tuple[str, bool]:
    """Compile them; what came of it, and whether all compiled."""
    hits = misses = 0
    failed = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=multiprocessing.get_context("fork")) as pool:
        for future in as_completed([pool.submit(compile_variant, number) for number in numbers]):
            try:
                name, found, made = future.result()
            except Exception as error:  # the others go on
                failed.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
                print(f"FAILED {error!r}", flush=True)
                continue
            hits, misses = hits + found, misses + made
            print(f"{name}: {'in the cache' if found else 'compiled'}", flush=True)
    said = f"{hits} kernels in the cache, {misses} compiled"
    return said + (f", {len(failed)} FAILED" if failed else ""), not failed


def main() -> int:
    arguments = make_parser("build", __doc__).parse_args()
    built = extensions() if arguments.device == "cuda" else "a CPU needs no extension built"
    said, done = kernels(chosen(arguments))
    say_key(f"{built}; {said}")
    return 0 if done and "NOT" not in built else 1


if __name__ == "__main__":
    sys.exit(main())
