"""What the tests of whole steps of the Triton path share."""

import pytest
import torch
from comparison import SoapRun, random_gradients, random_params, run_lockstep

OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "precondition_frequency": 3, "refresh": "staggered"}


def lockstep(shapes, steps, options, dtype=torch.float32, **kind):
    options = {**OPTIONS, **options}
    params = random_params(shapes, dtype=dtype)
    reference, tested = SoapRun(params, foreach=False, **options), SoapRun(params, fused=True, **options)
    return run_lockstep(reference, tested, random_gradients(shapes, steps, dtype=dtype, **kind), options)


QUICK_AND_SLOW = ["staggered", *(pytest.param(name, marks=pytest.mark.slow) for name in ("together", "adaptive"))]
