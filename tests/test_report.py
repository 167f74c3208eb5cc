"""The report to paste into bug reports, and where it gets its reasons: _ext.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparison import NO_ENGINE

import soap_opt
from soap_opt import SOAP, _ext
from soap_opt.report import report


def test_report_names_versions_and_implementations():
    text = report()
    for word in (f"soap_opt      {soap_opt.__version__}", torch.__version__, "triton", "numpy", "compressai", "compiler"):
        assert word in text
    assert f"cpu: active implementation: {'fused' if NO_ENGINE is None else 'multi tensor'}" in text
    if NO_ENGINE is not None:
        assert f"not available: {NO_ENGINE}" in text
    if not torch.cuda.is_available():
        assert "cuda          no device" in text


def test_report_as_a_command():
    result = subprocess.run([sys.executable, "-m", "soap_opt.report"], capture_output=True, text=True, check=True)
    others = [line for line in report().splitlines() if not line.startswith("torch  ")]  # (that one counts the threads)
    assert [line for line in result.stdout.splitlines() if not line.startswith("torch  ")] == others


def without_engine(tmp_path: Path, code: str, note: str | None = None) -> str:
    """Runs code in a process that imports a copy of the package as an install without a compiler leaves it."""
    copy = tmp_path / "soap_opt"
    for path in Path(soap_opt.__file__).parent.rglob("*.py"):
        target = copy / path.relative_to(Path(soap_opt.__file__).parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    if note is not None:
        (copy / "_build_failure.txt").write_text(note)
    # (an editable install's finder would find its soap_opt._C for any soap_opt)
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    start += "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]"
    command = [sys.executable, "-c", f"{start}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


TRAIN = """
import torch, soap_opt
assert soap_opt.__file__.startswith(sys.path[0]), soap_opt.__file__
param = torch.nn.Parameter(torch.ones(4, 3))
optimizer = soap_opt.SOAP([param], precondition_frequency=1)
for seed in range(4):
    param.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.step()
assert not param.eq(1).any()
from soap_opt.report import report
print(report())
try:
    soap_opt.SOAP([param], fused=True)
except RuntimeError as error:
    print("error:", error)
"""


def test_an_install_without_the_engine_works_and_says_so(tmp_path):
    text = without_engine(tmp_path, TRAIN)
    assert "cpu: active implementation: multi tensor" in text
    assert "not available: soap_opt was installed without its compiled part" in text
    assert "error: fused=True cannot be met: soap_opt was installed without its compiled part" in text


@pytest.mark.slow
def test_a_failed_build_is_reported_with_its_reason(tmp_path):
    text = without_engine(tmp_path, TRAIN, "RuntimeError: Error compiling objects for extension")
    assert "building soap_opt._C failed when soap_opt was installed: RuntimeError: Error compiling objects" in text


@pytest.mark.skipif(NO_ENGINE is not None, reason=str(NO_ENGINE))
def test_an_engine_for_another_torch_is_not_used(monkeypatch):
    from soap_opt import _C

    monkeypatch.setattr(_C, "torch_version", "1.0.0")
    reason = _ext._load()
    assert "was built with torch 1.0.0" in reason and torch.__version__ in reason


def test_devices_without_kernels():
    assert "xpu" in _ext.unavailable("xpu")
    assert _ext.active("xpu") == "multi tensor"


def test_a_meta_parameter_is_refused_only_when_fused_is_asked_for():
    param = torch.nn.Parameter(torch.ones(2, 2, device="meta"))
    SOAP([param])
    with pytest.raises(RuntimeError, match="no kernels of its own for device type 'meta'"):
        SOAP([param], fused=True)
