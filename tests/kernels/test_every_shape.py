"""Whole steps over many shapes, sizes and options: slow under the interpreter."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lockstep import lockstep

pytestmark = pytest.mark.usefixtures("fused_on_cpu")


@pytest.mark.slow
@pytest.mark.parametrize(("refresh", "normalize_grads"), [("together", False)])  # each takes two minutes under the interpreter
def test_every_size_in_every_rank(refresh, normalize_grads):
    sizes = [1, 2, 3, 5, 17, 33, 65, 130]
    shapes = [(size,) for size in sizes] + [(a, b) for a in sizes for b in sizes]
    shapes += [
        (17, 3, 5),
        (2, 33, 65),
        (130, 1, 3),
        (5, 17, 3, 3),
        (33, 3, 5, 5),
        (3, 5, 17, 2),
        (2, 3, 2, 5, 3),
        (1, 17, 1, 5, 2),
    ]
    options = {
        "refresh": refresh,
        "precondition_frequency": 2,
        "normalize_grads": normalize_grads,
        "precondition_1d": normalize_grads,
    }
    lockstep(shapes, 6, options, rank_one=0.2, missing=0.1)


SIZES = st.sampled_from([1, 2, 3, 5, 8, 17, 33, 65])
SHAPE = st.lists(SIZES, max_size=5).map(tuple).filter(lambda shape: torch.Size(shape).numel() <= 2500)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(SHAPE, min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    options=st.fixed_dictionaries(
        {
            "refresh": st.sampled_from(["together", "staggered", "adaptive"]),
            "precondition_frequency": st.integers(1, 3),
            "normalize_grads": st.booleans(),
            "precondition_1d": st.booleans(),
            "merge_dims": st.booleans(),
            "max_precond_dim": st.sampled_from([4, 20, 10000]),
            "maximize": st.booleans(),
        }
    ),
)
def test_any_mix(shapes, dtype, options):
    lockstep(shapes, 3, options, dtype=dtype, missing=0.1)


@pytest.mark.slow
def test_several_splits_of_a_gram():
    """More columns than one program of a Gram takes: 1,024 (D > 32), 2,048 (D <= 32) and 4,096 (D <= 16)."""
    lockstep([(40, 2300), (20, 4500), (9000, 3), (3, 9000), (500, 4, 5, 5)], 4, {"max_precond_dim": 64})
