"""Shared set-up. pytest puts this folder on sys.path: the helpers are ``import oracle`` and ``import comparison``."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

import soap_opt

# deadline: torch's first call of an operator is slow. derandomize in CI: a red build must be red again tomorrow.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    params = request.node.callspec.params
    if params.get("tested") == "fused" or params.get("flags", {}).get("fused"):
        reason = soap_opt._ext.unavailable(request.param)
        if reason is not None:
            pytest.skip(reason)
    return request.param


@pytest.fixture(autouse=True)
def _global_state(request):
    """One thread for tiny tensors, and no test leaves torch's global settings changed.

    A second thread's barriers cost a lockstep of 8 x 8 tensors ten times its work where the cores are shared.
    (SOAP_OPT_TEST_THREADS is for .ci/processors; tests that are about threads set their own.)
    """
    dtype, precision, threads = torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_num_threads()
    if request.path.parent.name != "examples":
        torch.set_num_threads(int(os.environ.get("SOAP_OPT_TEST_THREADS", 1)))
    yield
    torch.set_num_threads(threads)
    assert torch.get_default_dtype() == dtype
    assert torch.get_float32_matmul_precision() == precision
