"""These files run under Triton's interpreter only, in a process that has TRITON_INTERPRET=1 before Triton is imported:
tests/test_kernels.py starts one; by hand, ``TRITON_INTERPRET=1 python -m pytest tests/kernels``."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture
def fused_on_cpu(monkeypatch):
    """``fused=True`` on CPU tensors takes the Triton path."""
    from soap_opt import _ext, functional, soap, work

    for module in (functional, soap, work):
        monkeypatch.setattr(module, "runs_triton", lambda exp_avg: exp_avg.dtype == torch.float32)
    monkeypatch.setattr(
        functional, "all_on_cpu", lambda tensors: False
    )  # first gradients as on CUDA, without the C++ operators
    monkeypatch.setattr(_ext, "unavailable", lambda device_type: None)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that Triton's own launcher runs, in order."""
    from triton.runtime import interpreter

    names: list[str] = []
    original = interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda self, *a, **k: names.append(self.fn.__name__) or original(self, *a, **k)
    )
    return names
