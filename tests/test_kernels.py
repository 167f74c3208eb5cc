"""Runs tests/kernels under Triton's interpreter, in a process of its own: the variable counts when Triton is imported, and
would break torch.compile's tests in this process on a machine with a GPU."""

import csv
import importlib.metadata
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent


FILES = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
LONG = "test_every_shape.py"  # minutes for each of its tests, so that each gets a process of its own
RUNS = [("not slow", path.name) for path in FILES if path.name != LONG]
RUNS += [("slow", path.name) for path in FILES if path.name != LONG and "slow" in path.read_text().lower()]
RUNS += [("slow", f"{LONG}::{name}") for name in re.findall(r"^def (test_\w+)", FILES[0].with_name(LONG).read_text(), re.M)]


# The quick loop runs each kernel alone, which takes 10 seconds; the other files' quick tests are minutes.
QUICK = ("not slow", "test_stages.py")


def interpreter_fails() -> bool:
    """Triton 3.6's interpreter makes a Python number of an array [1], which numpy refuses from 2.5 on."""
    if not importlib.metadata.version("triton").startswith("3.6."):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            int(numpy.zeros(1))
        except TypeError:
            return True
    return False


@pytest.mark.skipif(interpreter_fails(), reason="Triton 3.6's interpreter needs numpy < 2.5")
@pytest.mark.parametrize(
    ("marker", "tests"), [pytest.param(*run, marks=[] if run == QUICK else [pytest.mark.slow]) for run in RUNS]
)
def test_under_tritons_interpreter(marker, tests):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marker, f"tests/kernels/{tests}"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


RESULTS = ROOT / "bench" / "results" / "kernels.csv"


def test_the_table_of_compiled_kernels_is_complete_and_nothing_spills():
    compile_kernels = pytest.importorskip("bench.compile_kernels")
    with RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    expected = [{"target": name, **row} for name in compile_kernels.TARGETS for row in compile_kernels.named_variants(name)]
    # with the oldest Triton that is supported, and with a later one
    versions = list(dict.fromkeys(row["triton"] for row in rows))
    assert len(versions) == 2 and versions[-1].startswith("3.6.")
    for version in versions:
        assert [{key: row[key] for key in expected[0]} for row in rows if row["triton"] == version] == expected
    for row in rows:
        registers, shared = compile_kernels.LIMITS[row["target"]]
        assert int(row["stack_bytes"]) == 0, row
        assert int(row["registers"]) <= registers and int(row["shared_bytes"]) <= shared, row


def test_what_is_aligned_is_read_and_written_in_vectors():
    """Of two classes of tiles, ROWS and not: every element of both operands, for each stage of the pipeline, in copies of 16
    bytes, and in Adam's epilogue m, v and U'. (The hint that says so was once lost when a call was inlined.)"""
    with RESULTS.open() as file:
        rows = [row for row in csv.DictReader(file) if row["target"].startswith("sm_") and row["precision"] == "tf32x3"]
    assert len(rows) == 2 * 3 * 11
    for row in rows:
        by_program = 32 * int(row["warps"]) * 16  # bytes that one instruction of all threads moves
        if row["grad"] in ("", "float32") and int(row["warps"]) < 16:  # (16 warps have 8 bytes of an operand for each thread)
            operands = 2 * 64 * int(row["deep"]) * 4
            assert int(row["copies_16"]) * by_program >= 2 * int(row["stages"]) * operands, row
        product = 64 * 64 * 4
        if row["kernel"] == "project_adam_kernel":
            assert int(row["loads_16"]) * by_program >= 2 * 2 * product, row
            assert int(row["stores_16"]) * by_program >= 2 * 3 * product, row
        elif row["kernel"] in ("project_kernel", "project_first_kernel", "reexpress_kernel"):
            assert int(row["stores_16"]) * by_program >= 2 * product, row
