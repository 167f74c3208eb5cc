"""``python -m soap_opt.report``: what is installed, which implementation runs where, and why the others do not.

The text is made to be pasted into a bug report.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

import torch

import soap_opt
from soap_opt import _ext
from soap_opt.functional import path_on
from soap_opt.options import Options


def report() -> str:
    """The report, one fact a line."""
    lines = [
        f"soap_opt      {soap_opt.__version__}",
        f"python        {platform.python_version()}",
        f"platform      {platform.platform()}",
        f"torch         {torch.__version__} ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})",
    ]
    for package in ("triton", "numpy", "compressai"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines.append(f"{package:13s} {version}")
    lines.append(f"compiler      {_compiler()}")
    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        lines.append(
            f"cuda          {torch.version.cuda or torch.version.hip}, {torch.cuda.device_count()} x {', '.join(names)}"
        )
    else:
        lines.append(
            f"cuda          no device (torch was built for {torch.version.cuda or torch.version.hip or 'the CPU only'})"
        )
    for device_type in ("cpu", "cuda"):
        lines.append("")
        lines.append(f"{device_type}: active implementation: {path_on(device_type, Options()).value}")
        lines.append("  single tensor  available (pure PyTorch, foreach=False: the specification)")
        lines.append("  multi tensor   available (pure PyTorch, foreach=True)")
        reason = _ext.unavailable(device_type)
        on_request = f"available (C++ engine, fused=True), instruction set {_capability()}"
        if device_type == "cuda":
            on_request = "available (Triton kernels, fused=True), by request only: never run on a GPU yet"
        lines.append("  fused          " + (on_request if reason is None else f"not available: {reason}"))
    lines.append(f"  CUDA refresh   {'built' if _ext._cuda_load_error is None else f'not built: {_ext._cuda_load_error}'}")
    return "\n".join(lines)


def _capability() -> str:
    """The engine's instruction set, and the environment variable that limits it."""
    if _ext.unavailable("cpu") is not None:
        return "none"
    capability: str = _ext.compiled_part().cpu_capability
    allowed = os.environ.get("SOAP_OPT_CPU_CAPABILITY")
    return capability + (f" (SOAP_OPT_CPU_CAPABILITY={allowed})" if allowed else "")


def _compiler() -> str:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    return "found" if found else "none found; soap_opt works without one"


if __name__ == "__main__":
    print(report())
