"""Whole steps through Triton's real JIT for GPUs that are not there (bench/fake_driver.py): what neither the interpreter nor
triton.compile sees. In a process of its own for each GPU, because Triton's driver is one for a process."""

import csv
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "kernels.csv"

# Launches of a steady step whose parameters have up to three products, one of them a Kronecker product
BY_DTYPE = {"project_first_kernel": 1, "gram_ema_kernel": 1}  # of gradients
FOR_ALL = {"project_kernel": 3, "project_adam_kernel": 1, "project_apply_kernel": 1}


def run(*command: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**environment, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_triton_can_launch_every_kernel():
    """No kernel has an argument of a name that Triton's generated binder uses itself."""
    run("-c", "from bench.fake_driver import *\nwith fake_driver(90): assert broken_binders() == {}, broken_binders()")


def compile_again(target: str, tmp_path: Path) -> None:
    """Every variant of every kernel, through the same JIT and its cache, to the figures in bench/results/kernels.csv."""
    with RESULTS.open() as file:
        installed = importlib.metadata.version("triton")
        committed = [row for row in csv.DictReader(file) if row["target"] == target and row["triton"] == installed]
    if committed:
        run("-m", "bench.compile_kernels", "-o", str(tmp_path / "kernels.csv"), target)
        with (tmp_path / "kernels.csv").open() as file:
            assert list(csv.DictReader(file)) == committed


@pytest.mark.slow
def test_kernels_for_amd_compile_to_the_committed_figures(tmp_path):
    compile_again("gfx942", tmp_path)


ALL = ["plain", "capturable", "recorded", "clipped, normalised", "precision high", "adaptive", "groups and dtypes"]


@pytest.mark.slow  # minutes of compiling where Triton's cache is empty
@pytest.mark.parametrize(("capability", "names"), [(80, ["plain"]), (90, ALL), (100, ["plain"])], ids=["80", "90", "100"])
def test_whole_steps_launch_what_the_plan_says_and_compile_it_once(capability, names, tmp_path):
    chosen = [word for name in names for word in ("--case", name)]
    run("-m", "bench.fake_driver", "--capability", str(capability), "--json", str(tmp_path / "steps.json"), *chosen)
    found = json.loads((tmp_path / "steps.json").read_text())
    assert found["broken"] == {}
    cases: dict[str, list] = {}
    for row in found["steps"]:
        cases.setdefault(row["case"], []).append(row)
    assert sorted(cases) == sorted(names)
    for case, steps in cases.items():
        dtypes = 3 if case == "groups and dtypes" else 1
        for row in steps:
            launches = dict(row["launches"])
            reexpressed, due = launches.pop("reexpress_kernel", 0), launches.pop("due_kernel", 0)
            if row["step"] == 0:  # the first gradient only initialises
                assert launches == {}
                continue
            assert launches == {**{name: dtypes for name in BY_DTYPE}, **FOR_ALL}, row
            # some unit of a convolution or of a matrix is due at every step; a step that gets ready for a capture launches
            # both kernels once for nothing, to have them loaded
            assert reexpressed in (2, 4, 5) and due <= 1, row
        # nothing is compiled by a second step that the first did not compile
        assert not any(row["compiled"] for row in steps[2:]), case
    assert cases["plain"][1]["compiled"]
    if names is ALL:
        assert cases["recorded"][-1]["launches"]["due_kernel"] == 1
        # options are numbers in a table: they compile nothing
        assert {case for case, steps in cases.items() if steps[1]["compiled"]} <= set(ALL) - {"clipped, normalised", "adaptive"}
        compile_again(f"sm_{capability}", tmp_path)  # here, because most of it is compiled
