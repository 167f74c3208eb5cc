"""What only nvcc or a GPU can show of the CUDA refresh. Skips itself where they are not.

Not run on a GPU so far: see "Honest limits" in the README. The operator's results on a GPU are in test_refresh_basis.py.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matrices import make, orthogonal
from test_refresh_basis import results_for

from soap_opt import _ext

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench import refresh_kernels  # noqa: E402
from bench.results import read  # noqa: E402

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or _ext._cuda_load_error is not None,
    reason="no CUDA device" if not torch.cuda.is_available() else str(_ext._cuda_load_error),
)


ROOT = Path(__file__).parents[2]


def build(tmp_path, **environment):
    """``setup.py build_ext`` of a copy of the sources, in which no compiler works."""
    for name in ("soap_opt", "csrc", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "kernels"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SOAP_OPT_BUILD", "TORCH_CUDA"))}
    environment = {**kept, "CC": "false", "CXX": "false", **environment}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("variable", "value"), [("", ""), ("SOAP_OPT_BUILD", "1"), ("SOAP_OPT_BUILD_CUDA", "1")])
def test_a_build_that_was_asked_for_is_an_error_when_it_fails(tmp_path, variable, value):
    """And otherwise never."""
    done = build(tmp_path, **({variable: value} if variable else {"SOAP_OPT_BUILD_CUDA": "0"}))
    assert (done.returncode != 0) == bool(variable), done.stderr[-2000:]
    assert (tmp_path / "soap_opt" / "_build_failure.txt").exists() != bool(variable)


def test_builds_that_contradict_each_other(tmp_path):
    done = build(tmp_path, SOAP_OPT_BUILD="0", SOAP_OPT_BUILD_CUDA="1")
    assert done.returncode != 0 and "contradict" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("chip", ("8.0", "9.0", "10.0"))
def test_nvcc_builds_without_spills(chip):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    if "sm_" + chip.replace(".", "") not in known:
        pytest.skip(f"this nvcc does not know {chip}")
    kernels = refresh_kernels.ptxas(chip)
    of_tables = ("refresh_in_warps_kernel", "multiply_tiles_kernel", "refresh_in_blocks_kernel", "rotate_tiles_kernel")
    assert kernels.keys() == {*(f"{name}<{rows}>" for name in of_tables for rows in (32, 740)), "factor_panel_kernel"}
    for name, figures in kernels.items():
        assert figures["stack"] == figures["spill_stores"] == figures["spill_loads"] == 0, name
        # four blocks of 128 threads, one of 512
        assert figures["registers"] <= 128, name


def test_committed_figures():
    """The tables in bench/results: no spills, every chip, and accuracy within what is allowed."""
    resources = read("refresh_resources")
    assert {row["chip"] for row in resources} == {"sm_80", "sm_86", "sm_90", "sm_100"}
    assert not any(row["spill_stores"] or row["stack"] for row in resources)
    assert all(row["blocks_per_sm"] >= 1 for row in resources)
    accuracy = read("refresh_accuracy")
    assert {row["d"] for row in accuracy} >= {1, 2, 3, 5, 16, 31, 32, 33, 64, 100, 128, 192, 224, 225, 320, 512, 1024, 2049}
    assert max(row["share_of_allowed"] for row in accuracy) <= 1


@on_gpu
def test_the_host_waits_for_nothing():
    grams = [torch.from_numpy(make("gram", d)).cuda() for d in (5, 32, 100, 224, 320)]
    bases = [torch.from_numpy(orthogonal(len(gram))).cuda() for gram in grams]
    due = torch.ones(len(grams), dtype=torch.bool, device="cuda")
    results = results_for(bases)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.soap_opt.refresh_basis_(grams, bases, *results, 0.01, due)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("copies", (1, 10), ids=("few", "many"))
def test_graph_capture(copies):
    """A captured refresh does what an eager one does, and nothing where its device flag says so."""
    sizes = [5, 32, 100, 192] * copies
    grams = [torch.from_numpy(make("gram", d, seed=i)).cuda() for i, d in enumerate(sizes)]
    start = [torch.from_numpy(orthogonal(d)).cuda() for d in sizes]
    expected, bases = [q.clone() for q in start], [q.clone() for q in start]
    torch.ops.soap_opt.refresh_basis_(grams, expected, *results_for(expected))
    due = torch.zeros(len(grams), dtype=torch.bool, device="cuda")
    results = results_for(bases)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.ops.soap_opt.refresh_basis_(grams, bases, *results, -1.0, due)  # warm up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.soap_opt.refresh_basis_(grams, bases, *results, -1.0, due)
    outcomes = results[2]
    graph.replay()
    assert outcomes.tolist() == [0] * len(sizes)
    assert all(torch.equal(a, b) for a, b in zip(bases, start))
    due.fill_(True)
    graph.replay()
    assert outcomes.tolist() == [1] * len(sizes)
    assert all(torch.equal(a, b) for a, b in zip(bases, expected))


@on_gpu
def test_many_matrices_in_one_call():
    """More than a table holds (740), in every kernel's size, against the CPU's."""
    sizes = [3, 17, 32, 40, 70] * 200
    grams = [torch.from_numpy(make("gram", d, seed=i % 7)) for i, d in enumerate(sizes)]
    bases = [torch.from_numpy(orthogonal(d, seed=i % 5)) for i, d in enumerate(sizes)]
    moved = [q.cuda() for q in bases]
    results = results_for(moved)
    torch.ops.soap_opt.refresh_basis_([g.cuda() for g in grams], moved, *results)
    torch.ops.soap_opt.refresh_basis_(grams, bases, *results_for(bases))
    assert results[2].tolist() == [1] * len(sizes)
    for a, b in zip(bases, moved):
        overlap = (a * b.cpu()).sum(0).abs()
        assert overlap[0] > 0.999  # the leading eigenvector's estimate is determined on both
