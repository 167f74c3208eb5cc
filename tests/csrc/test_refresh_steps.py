"""Whole steps whose refreshes go through the compiled operator: the engine's, and the CUDA one on fibers."""

import pytest
import torch
from comparison import SoapRun, random_gradients, random_params, run_lockstep
from harness import SHARED_LIMITS

from soap_opt import _ext, multi_tensor
from soap_opt.refresh_operator import refresh_bases_, why_missing

SHAPES = ((8, 8), (6, 4, 3, 3), (40, 12), (5, 3, 4), (33, 70), (7,))


@pytest.fixture(params=["cpu", "fibers"])
def operator(request, monkeypatch):
    """The multi-tensor path, its refreshes through refresh_bases_; a list with the number of units of each call."""
    if request.param == "fibers":
        operators = request.getfixturevalue("fibers")
        operators.configure(1, SHARED_LIMITS["sm_90"])
        monkeypatch.setattr(torch.ops.soap_opt, "refresh_basis_", operators.refresh_basis_)
    elif _ext._load_error is not None:
        pytest.skip(_ext._load_error)
    calls = []

    def refresh_units(due, grams, bases, tolerance):
        calls.append(len(due))
        refreshed, _ = refresh_bases_([grams[i][k] for i, k in due], [bases[i][k] for i, k in due], tolerance)
        result = {}
        for (i, k), new in zip(due, refreshed):  # identities where "adaptive" passed over
            result.setdefault(i, {})[k] = new
        return result, []

    monkeypatch.setattr(multi_tensor, "refresh_units", refresh_units)
    return calls


@pytest.mark.parametrize("refresh", ("together", "staggered", "adaptive"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_lockstep_with_the_specification(operator, refresh, dtype):
    options = {"precondition_frequency": 3, "refresh": refresh, "refresh_tolerance": 0.05}
    params = random_params(SHAPES, dtype=dtype)
    reference, tested = SoapRun(params, foreach=False, **options), SoapRun(params, foreach=True, **options)
    refreshed = run_lockstep(reference, tested, random_gradients(SHAPES, 10, dtype=dtype), options)
    assert refreshed > 10
    assert sum(operator) >= refreshed  # every refresh went through the operator; adaptive passes some over


def test_nothing_and_nowhere():
    refreshed, outcomes = refresh_bases_([], [])
    assert refreshed == [] and outcomes.tolist() == []
    assert "mps" in why_missing("mps")
