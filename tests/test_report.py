"""The report to paste into bug reports, and where it gets its reasons: _ext.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparison import NO_ENGINE, needs_engine

import soap_opt
from soap_opt import SOAP, _ext
from soap_opt.functional import Path as Implementation
from soap_opt.functional import path_on
from soap_opt.options import Options
from soap_opt.report import report


def test_report_names_versions_and_implementations():
    text = report()
    for word in (f"soap_opt      {soap_opt.__version__}", torch.__version__, "triton", "numpy", "compressai", "compiler"):
        assert word in text
    assert f"cpu: active implementation: {'C++ engine' if NO_ENGINE is None else 'multi tensor'}" in text
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


@pytest.mark.slow
def test_an_install_without_the_engine_works_and_says_so(tmp_path):
    text = without_engine(tmp_path, TRAIN)
    assert "cpu: active implementation: multi tensor" in text
    assert "not available: soap_opt was installed without its compiled part" in text
    assert "error: fused=True cannot be met: soap_opt was installed without its compiled part" in text


@pytest.mark.slow
def test_a_failed_build_is_reported_with_its_reason(tmp_path):
    text = without_engine(tmp_path, TRAIN, "RuntimeError: Error compiling objects for extension")
    assert "building soap_opt._C failed when soap_opt was installed: RuntimeError: Error compiling objects" in text


CAPABILITIES = ["default", "avx2", "avx512"]
# Which instruction set runs, what the report says, and a step's Gram in whose last digits it shows
CAPABILITY = """
import torch, soap_opt
from soap_opt.report import report
param = torch.nn.Parameter(torch.zeros(40, 1000))
optimizer = soap_opt.SOAP([param], fused=True)
param.grad = torch.randn(40, 1000, generator=torch.Generator().manual_seed(0))
optimizer.step()
print(soap_opt._C.cpu_capability)
print(next(line for line in report().splitlines() if "C++ engine, fused=True" in line).strip())
print(optimizer.state[param]["gram_0"].double().sum().item().hex())
"""


def with_capability(value: str | None) -> subprocess.CompletedProcess:
    environment = {key: x for key, x in os.environ.items() if key != "SOAP_OPT_CPU_CAPABILITY"}
    if value is not None:
        environment["SOAP_OPT_CPU_CAPABILITY"] = value
    return subprocess.run([sys.executable, "-c", CAPABILITY], capture_output=True, text=True, env=environment)


@needs_engine
@pytest.mark.slow
def test_the_instruction_set_is_forced_down_only():
    runs = {value: with_capability(value) for value in (None, *CAPABILITIES)}
    assert all(run.returncode == 0 for run in runs.values()), [run.stderr for run in runs.values()]
    runs = {value: run.stdout.splitlines() for value, run in runs.items()}
    own = runs[None][0]
    assert runs[None][1].endswith(f"available (C++ engine, fused=True), instruction set {own}")
    for value in CAPABILITIES:
        used = CAPABILITIES[min(CAPABILITIES.index(value), CAPABILITIES.index(own))]
        assert runs[value][0] == used
        assert runs[value][1].endswith(f"instruction set {used} (SOAP_OPT_CPU_CAPABILITY={value})")
        # 1000 products round otherwise with and without FMA; the same instructions in the same order do not
        assert used != own or runs[value][2] == runs[None][2]
        assert used != "default" or own == "default" or runs[value][2] != runs[None][2]


@needs_engine
def test_an_unknown_instruction_set_is_an_error():
    run = with_capability("AVX2")
    assert run.returncode == 1
    assert "ValueError: SOAP_OPT_CPU_CAPABILITY must be default, avx2 or avx512, got 'AVX2'" in run.stderr


@needs_engine
def test_an_engine_for_another_torch_is_not_used(monkeypatch):
    from soap_opt import _C

    monkeypatch.setattr(_C, "torch_version", "1.0.0")
    reason = _ext._load()
    assert "was built with torch 1.0.0" in reason and torch.__version__ in reason


def test_devices_without_kernels():
    assert "xpu" in _ext.unavailable("xpu")
    assert path_on("xpu", Options()) is Implementation.MULTI


def test_a_meta_parameter_is_refused_only_when_fused_is_asked_for():
    param = torch.nn.Parameter(torch.ones(2, 2, device="meta"))
    SOAP([param])
    with pytest.raises(RuntimeError, match="no kernels of its own for device type 'meta'"):
        SOAP([param], fused=True)
