"""The one place that loads the compiled extension, and remembers why it could not."""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def _imported(name: str, absent: str) -> str | None:
    """Import soap_opt.NAME; returns the reason when that fails: ``absent`` where the module was not to be built."""
    try:
        importlib.import_module(f"soap_opt.{name}")
    except ModuleNotFoundError:
        note = Path(__file__).with_name("_build_failure.txt" if name == "_C" else "_cuda_build_failure.txt")
        if note.exists():
            return f"building soap_opt.{name} failed when soap_opt was installed: {note.read_text().strip()}"
        return absent
    except ImportError as error:
        return f"soap_opt.{name} does not load with torch {torch.__version__}: {error}"
    return None


def compiled_part() -> ModuleType:
    """The module soap_opt._C, where it was built."""
    return importlib.import_module("soap_opt._C")


def _load() -> str | None:
    """Load soap_opt._C, which registers torch.ops.soap_opt.*; returns the reason when that fails."""
    reason = _imported("_C", "soap_opt was installed without its compiled part (see the README's section Install)")
    if reason is not None:
        return reason
    built_with: str = compiled_part().torch_version
    wanted, running = (version.split("+")[0].rsplit(".", 1)[0] for version in (built_with, torch.__version__))
    if wanted != running:
        return f"soap_opt._C was built with torch {built_with}, this is {torch.__version__}; reinstall soap_opt"
    if not hasattr(compiled_part(), "step_"):  # (built in place, and the sources have gone on)
        return "soap_opt._C was built from an older soap_opt; reinstall soap_opt"
    _register_fakes()
    return None


def _register_fakes() -> None:
    """Register the operators' results for tensors without data: for torch.compile, export and torch.library.opcheck."""

    def step(params: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return torch.empty(len(params), dtype=torch.int32, device="cpu")

    def gram_ema(grads: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return torch.empty(len(grads), dtype=torch.float64, device="cpu")

    def refresh_basis(*args: Any, **kwargs: Any) -> None:
        return None

    def init_basis(grams: list[Tensor]) -> list[Tensor]:
        return [torch.empty_like(gram) for gram in grams]

    # (called, because as decorators these have no type annotations)
    torch.library.register_fake("soap_opt::step_", step)
    torch.library.register_fake("soap_opt::gram_ema_", gram_ema)
    torch.library.register_fake("soap_opt::refresh_basis_", refresh_basis)
    torch.library.register_fake("soap_opt::init_basis", init_basis)


def _load_cuda() -> str | None:
    """Load soap_opt._C_cuda, the CUDA implementations of the operators of soap_opt._C; returns the reason when that fails.

    The module loads without a GPU too: it does not touch the CUDA runtime before the first call.
    """
    absent = "soap_opt was installed without its CUDA part: there was no CUDA toolkit, or SOAP_OPT_BUILD_CUDA=0"
    return _load_error or _imported("_C_cuda", absent)


_load_error = _load()
_cuda_load_error = _load_cuda()


@lru_cache
def _triton_error() -> str | None:
    """Import the Triton kernels; returns the reason when that fails. (Late: `import soap_opt` does not wait for Triton.)"""
    try:
        importlib.import_module("soap_opt.kernels.project")
        importlib.import_module("soap_opt.kernels.gram_ema")
    except ImportError as error:
        return f"the Triton kernels do not load: {error}"
    if torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() < (8, 0):
        return f"the Triton kernels need compute capability 8.0, {torch.cuda.get_device_name()} is older"
    return None


def unavailable(device_type: str) -> str | None:
    """Why ``fused=True`` cannot run on a device of this type; None where it can."""
    if device_type == "cpu":
        return _load_error
    if device_type == "cuda":
        return _triton_error()
    return f"soap_opt has no kernels of its own for device type {device_type!r}"


def is_default(device_type: str) -> bool:
    """Whether ``foreach=None, fused=None`` picks the package's own kernels on a device of this type.

    On CUDA it does not: the Triton path has been proved under the interpreter and by compilation, but never run on a GPU.
    """
    return device_type == "cpu" and unavailable(device_type) is None
