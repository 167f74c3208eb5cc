"""``-p bench.first_hour.pytest_plugin``: the tests' kernels are found in the cache that first_hour_prepare.sh made.

In Triton 3.6 a kernel's hash depends on which ones the process hashed before it (common.same_hashes); tests whose first step is
of another kind than the stages' would compile for themselves. Does nothing without Triton and with its interpreter.
"""

import importlib.util
import os


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None:
        return
    from . import common

    common.same_hashes()
