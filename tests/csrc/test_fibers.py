"""fibers.h itself: kernels with a fault are reported, and right ones run right."""

import signal
import subprocess
from pathlib import Path

import pytest
from harness import HERE, build


@pytest.fixture(scope="module")
def selftest(tmp_path_factory) -> Path:
    return build([HERE / "fibers_selftest.cpp"], tmp_path_factory.mktemp("fibers") / "selftest", ["-O1"])


def run(program, case, seed=1):
    return subprocess.run([program, case, str(seed)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("case", ("barrier", "collectives"))
def test_right_kernels(selftest, case):
    for seed in range(5):
        assert run(selftest, case, seed).returncode == 0


@pytest.mark.parametrize("case", ("missing_barrier", "unset_shared_memory"))
def test_wrong_results(selftest, case):
    for seed in range(5):
        assert run(selftest, case, seed).returncode == 1


@pytest.mark.parametrize(
    "case, words",
    [
        ("two_barriers", "48 wait at line"),
        ("barrier_of_some", "divergent: 56 threads returned, 40 wait"),
        ("half_a_warp", "divergent: 48 threads returned, 48 wait"),
        ("foreign_mask", "outside the mask"),
        ("too_much_shared_memory", "bytes of shared memory"),
    ],
)
def test_faults_are_named(selftest, case, words):
    for seed in range(5):
        done = run(selftest, case, seed)
        assert done.returncode == 3
        assert words in done.stderr


@pytest.mark.parametrize("case", ("beyond_the_end", "before_the_beginning"))
def test_shared_memory_has_an_end(selftest, case):
    assert run(selftest, case).returncode == -signal.SIGSEGV
