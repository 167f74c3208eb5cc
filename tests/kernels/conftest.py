"""These files run under Triton's interpreter only, in a process that has TRITON_INTERPRET=1 before Triton is imported:
tests/test_kernels.py starts one; by hand, ``TRITON_INTERPRET=1 python -m pytest tests/kernels``."""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture
def fused_on_cpu():
    """``fused=True`` on CPU tensors takes the Triton path."""
    from bench.fake_driver import triton_path_on_cpu

    with triton_path_on_cpu():
        yield


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
