"""Parameters that have all threads because they, or their due refreshes, outweigh the rest: each thread's scratch and slab."""

import pytest
import torch
from comparison import IMPLEMENTATIONS, SoapRun, needs_engine, random_gradients, random_params, run_lockstep


@needs_engine
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("shape", [(136, 2), (160, 10), (128, 120), (2, 256, 5, 5), (3, 192, 5, 5)], ids=str)
def test_lockstep_of_a_parameter_stepped_by_all_threads(shape, threads):
    torch.set_num_threads(threads)
    options = {"precondition_frequency": 1, "refresh": "together", "lr": 0.01}
    params = random_params([shape])
    reference, tested = (SoapRun(params, **IMPLEMENTATIONS[name], **options) for name in ("single", "fused"))
    assert run_lockstep(reference, tested, random_gradients([shape], 4), options) > 0
