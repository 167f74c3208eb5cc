"""Builds refresh_harness.cpp with g++ and runs matrices through the CUDA kernels on fibers."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
KERNELS = sorted(path for path in CUDA.glob("*.cuh"))

KEPT, REFRESHED, FAILED = 0, 1, 2

# cudaDevAttrMaxSharedMemoryPerBlockOptin, from NVIDIA's table of compute capabilities
SHARED_LIMITS = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448}


class Refreshed(NamedTuple):
    outcome: int
    order: np.ndarray  # [d] int64
    basis: np.ndarray  # [d, d]
    rotation: np.ndarray  # [d, d]


def compiler() -> str:
    """The C++ compiler; skips the test where there is none."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("no g++: the CUDA kernels are compiled for fibers by the test itself")
    if "x86" not in os.uname().machine and "aarch64" not in os.uname().machine:
        pytest.skip("fibers.h was tried on x86-64 and aarch64 Linux")
    return found


def build(sources: Sequence[Path], output: Path, flags: Sequence[str], libraries: Sequence[str] = ()) -> Path:
    """Compile; a failure is the test's failure and shows the compiler's words."""
    # fortified, glibc's longjmp takes a switch to another stack for a mistake; some distributions fortify by default
    command = [compiler(), "-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", *flags]
    command += [*map(str, sources), "-o", str(output), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return output


@functools.cache
def binary(*flags: str, change: tuple[str, str] | None = None) -> Path:
    """The harness, built once for a session for each set of flags; ``change`` replaces one text of the kernels by another."""
    folder = Path(tempfile.mkdtemp(prefix="soap_opt_fibers_"))
    source = HERE / "refresh_harness.cpp"
    if change is not None:
        # the same tree once more: quoted includes look beside the including file first
        for part in (HERE, CUDA):
            target = folder / part.relative_to(HERE.parents[1])
            target.mkdir(parents=True)
            for file in (*part.glob("*.cpp"), *part.glob("*.cu"), *part.glob("*.h"), *part.glob("*.cuh")):
                shutil.copy(file, target)
        source = folder / "tests" / "csrc" / source.name
        changed = 0
        for file in (folder / "csrc" / "cuda").glob("*.cuh"):
            changed += file.read_text().count(change[0])
            file.write_text(file.read_text().replace(*change))
        assert changed, f"{change[0]!r} is not in the kernels"
    return build([source], folder / "refresh_harness", flags or ("-O2",))


def launch(
    problems: Sequence[tuple],
    *,
    program: Path | None = None,
    seed: int = 1,
    skip: int = 0,
    limit: int = SHARED_LIMITS["sm_90"],
    tolerance: float = -1.0,
    timeout: float = 240,
) -> tuple[subprocess.CompletedProcess, list[Refreshed]]:
    """The finished process and, where it returned 0, the results. Problems: (gram, basis) or (gram, basis, due)."""
    program = program or binary()
    with tempfile.TemporaryDirectory(prefix="soap_opt_fibers_") as folder:
        into, out = Path(folder) / "in", Path(folder) / "out"
        with into.open("wb") as file:
            for gram, basis, *due in problems:
                np.array([len(gram), *(due or [True])], dtype=np.int64).tofile(file)
                np.ascontiguousarray(gram, dtype=np.float32).tofile(file)
                np.ascontiguousarray(basis, dtype=np.float32).tofile(file)
        arguments = [f"seed={seed}", f"skip={skip}", f"limit={limit}", f"tolerance={float(tolerance)!r}"]
        done = subprocess.run([program, into, out, *arguments], capture_output=True, text=True, timeout=timeout)
        results = []
        if done.returncode == 0:
            data, at = out.read_bytes(), 0

            def take(dtype, *shape):
                nonlocal at
                count = int(np.prod(shape))
                array = np.frombuffer(data, dtype, count, at).reshape(shape)
                at += array.nbytes
                return array

            for gram, *_ in problems:
                d = len(gram)
                results.append(
                    Refreshed(int(take(np.int64, 1)[0]), take(np.int64, d), take(np.float32, d, d), take(np.float32, d, d))
                )
            assert at == len(data)
    return done, results


def refresh(problems: Sequence[tuple], **options) -> list[Refreshed]:
    """The results; the kernel's own complaint where there are none."""
    done, results = launch(problems, **options)
    assert done.returncode == 0, f"the harness ended with {done.returncode}: {done.stderr[-4000:]}"
    return results


@functools.cache
def operators():
    """torch.ops.soap_opt_fibers: the CUDA operators, their kernels on fibers and ATen's products on the CPU; built once."""
    import torch

    torch_folder = Path(torch.__file__).parent
    flags = ["-O1", "-shared", "-fPIC", f"-isystem{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
    library = build(
        [HERE / "operator_on_fibers.cpp"],
        Path(tempfile.mkdtemp(prefix="soap_opt_fibers_")) / "operator_on_fibers.so",
        [*flags, f"-Wl,-rpath,{torch_folder / 'lib'}"],
        libraries=["-ltorch_cpu", "-lc10"],
    )
    torch.ops.load_library(str(library))
    return torch.ops.soap_opt_fibers


def refresh_by_operator(problems: Sequence[tuple], *, seed: int = 1, limit: int = SHARED_LIMITS["sm_90"]) -> list[Refreshed]:
    """The whole operator, as a GPU would run it: what outgrows shared memory goes through the host code's blocked QR."""
    import torch

    grams, bases = ([torch.tensor(x, dtype=torch.float32) for x in column] for column in zip(*problems))
    orders = [torch.empty(len(gram), dtype=torch.int64) for gram in grams]
    rotations, outcomes = [torch.empty_like(gram) for gram in grams], torch.full((len(grams),), -1, dtype=torch.int32)
    operators().configure(seed, limit)
    operators().refresh_basis_(grams, bases, orders, rotations, outcomes)
    return [
        Refreshed(outcome, order.numpy(), basis.numpy(), rotation.numpy())
        for outcome, order, basis, rotation in zip(outcomes.tolist(), orders, bases, rotations)
    ]


def barriers() -> dict[str, tuple[int, str]]:
    """Every barrier of the kernels, "file:line", as fibers.h tells places, and its line."""
    found = {}
    for path in KERNELS:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.match(r"\s*__sync(threads|warp)\(\)", line):
                found[f"{path.name}:{number}"] = place_of(path.name, number), line.strip()
    return found


def place_of(name: str, line: int) -> int:
    """As fibers.h has it."""
    return functools.reduce(lambda value, c: (31 * value + ord(c)) % 20011, name, 0) * 100_000 + line
