"""The engine's tests once more with each set of instructions that the processor has besides the best: each has register tiles
of its own, and the baseline adds in another order.

(.ci/processors runs all tests so, with torch's own kernels and BLAS of that processor.)
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from comparison import NO_ENGINE

import soap_opt

pytestmark = [pytest.mark.skipif(NO_ENGINE is not None, reason=str(NO_ENGINE)), pytest.mark.slow]

HERE = Path(__file__).parent
FILES = [
    "test_step_lockstep.py",
    "test_parallel_step.py",
    "test_operators.py",
    "test_operator_results.py",
    "test_refresh_basis.py",
    "test_refresh_steps.py",
    "test_degenerate_grams.py",
]
SETS = ["default", "avx2", "avx512"]
# Which set the inner process runs with, then the tests
RUN = "import sys, pytest, soap_opt; print(soap_opt._C.cpu_capability, flush=True); sys.exit(pytest.main(sys.argv[1:]))"


@pytest.mark.parametrize("name", SETS)
def test_steps_and_operators_with_fewer_instructions(name):
    own = soap_opt._C.cpu_capability
    if name == own:
        pytest.skip(f"the tests of this process run with {own} already")
    if SETS.index(name) > SETS.index(own):
        pytest.skip(f"no {name} here, or SOAP_OPT_CPU_CAPABILITY forbids it (.ci/sanitize checks AVX-512's tiles without it)")
    environment = {**os.environ, "SOAP_OPT_CPU_CAPABILITY": name}
    # What this process is started with (a worker of xdist, PYTEST_ADDOPTS) is not for the inner run
    for variable in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        environment.pop(variable, None)
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            RUN,
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow",
            *(HERE / file for file in FILES),
        ],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    lines = run.stdout.splitlines()
    assert lines[0] == name and " passed" in lines[-1]
