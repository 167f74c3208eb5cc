"""Numbers that Python and C++ have to agree in, compared where each is written."""

import re
from pathlib import Path

import pytest

from soap_opt import eigenbasis, layout, refresh_operator
from soap_opt.cuda import columns
from soap_opt.diagnostics import memory
from soap_opt.options import Options, names_of
from soap_opt.schedule import POLICIES

CSRC = Path(__file__).parents[1] / "csrc"


def constant(file: str, name: str) -> int:
    """The last definition of an integer constant (the first ones are the tests' own, behind #ifdef)."""
    found = re.findall(rf"\b{name} = (\d+)\b", (CSRC / file).read_text())
    assert found, f"{file} has no {name}"
    return int(found[-1])


@pytest.mark.parametrize(
    ("python", "file", "name"),
    [
        (memory.THREADED_SIZE, "cpu/refresh_basis.h", "kThreadedSize"),
        (layout.KRONECKER_MAX_WIDTH, "cpu/layout.h", "kKroneckerWidth"),
        (refresh_operator.WARP_LIMIT, "cuda/refresh_basis.h", "kWarpLimit"),
        (refresh_operator.LARGEST, "cuda/refresh_basis.h", "kBlockLimit"),
        (refresh_operator.SMALL_TABLE_ROWS, "cuda/reflector.cuh", "kSmallTableRows"),
        (columns.KEPT, "cuda/refresh_basis.h", "kKept"),
        (columns.REFRESHED, "cuda/refresh_basis.h", "kRefreshed"),
        (columns.FAILED, "cuda/refresh_basis.h", "kFailed"),
    ],
)
def test_a_constant_is_that_of_the_cpp(python, file, name):
    assert python == constant(file, name)


def test_the_engine_reads_the_options_in_their_order():
    header = (CSRC / "cpu/step_arguments.h").read_text()
    (body,) = re.findall(r"^struct StepOptions \{(.*?)^\};", header, re.M | re.S)
    fields = re.findall(r"^  double (\w+);", body, re.M)
    betas, *others = names_of("step")
    assert betas == "betas" and fields == ["beta1", "beta2", *others]
    (policies,) = re.findall(r"^constexpr double (.*?);", header, re.M)
    assert policies == ", ".join(f"k{policy.capitalize()} = {place}" for place, policy in enumerate(POLICIES))
    row = Options(betas=(0.25, 0.5), shampoo_beta=-1.0, refresh="adaptive", maximize=True, precondition_frequency=7).step_row()
    assert dict(zip(fields, row)) == {
        "beta1": 0.25, "beta2": 0.5, "eps": 1e-8, "shampoo_beta": 0.5, "precondition_frequency": 7.0, "normalize_grads": 0.0,
        "correct_bias": 1.0, "refresh": 2.0, "refresh_tolerance": 0.01, "maximize": 1.0,
    }  # fmt: skip
    assert Options(precondition_frequency=10**400).step_row()[4] == 2.0**53


def test_shared_memory_of_a_block():
    """refresh_operator.block_shared_memory against the expression in block.cuh, for every size."""
    (expression,) = re.findall(
        r"block_shared_floats\(int64_t d\) \{\s*return (.*?);", (CSRC / "cuda/block.cuh").read_text(), re.S
    )
    names = {"kPanel": constant("cuda/refresh_basis.h", "kPanel"), "kWarp": constant("cuda/reflector.cuh", "kWarp")}
    for d in range(1, refresh_operator.LARGEST + 1):
        assert refresh_operator.block_shared_memory(d) == 4 * eval(expression, {**names, "d": d})


def test_the_bound_of_an_orthogonal_basis():
    """512 eps sqrt(d), written once for PyTorch, the engine, the CUDA kernels and their host code."""
    sources = [
        CSRC / "cpu/loops.h",
        CSRC / "cuda/reflector.cuh",
        CSRC / "cuda/refresh_basis_host.cpp",
        Path(eigenbasis.__file__),
    ]
    factors = [re.findall(r"(?:return|bound = |bound: float =) ?(\d+) \* .*eps", path.read_text(), re.I) for path in sources]
    assert factors == [["512"]] * len(sources)
