"""memory_report counts what an optimizer holds, and foretells what it will hold. And the documentation's example runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparison import needs_engine, random_gradients
from torch import nn

import soap_opt
from soap_opt import SOAP, cpu, memory_report


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 5), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 10), nn.LayerNorm(10))


def held(optimizer):
    return sum(value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize(
    "options",
    [{}, {"merge_dims": True, "max_precond_dim": 40}, {"precondition_1d": True}, {"max_precond_dim": 7}, {"foreach": True}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_foretold_is_what_is_held(options, dtype):
    net = model().to(dtype)
    before = memory_report(net, **options)
    optimizer = SOAP(net.named_parameters(), **options)
    assert memory_report(optimizer).by_parameter == before.by_parameter  # no state yet: foretold
    for param in net.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    during = memory_report(optimizer)
    assert during.by_parameter == before.by_parameter and during.total == held(optimizer) == before.total
    itemsize = 8 if dtype == torch.float64 else 4
    assert before.by_kind["exp_avg"] == itemsize * sum(p.numel() for p in net.parameters())


def test_numbers_of_one_convolution():
    """(8, 3, 5, 5): m and v of 600 numbers, Grams and bases of 8^2 + 3^2 + 5^2 + 5^2."""
    report = memory_report([torch.zeros(8, 3, 5, 5)])
    row = report.by_parameter["0"]
    assert row["exp_avg"] == row["exp_avg_sq"] == 4 * 600
    assert row["gram"] == row["basis"] == 4 * (64 + 9 + 25 + 25)
    assert row["other"] == 4 + 1 + 4 * 8


def test_merging_may_cost_a_lot():
    """The example of the warning at construction: a (64, 32) weight merged to one mode has a Gram of 2048 x 2048."""
    plain, merged = (memory_report([torch.zeros(64, 32)], merge_dims=merge) for merge in (False, True))
    assert plain.by_kind["gram"] == 4 * (64**2 + 32**2)
    assert merged.by_kind["gram"] == 4 * 2048**2


def test_the_table():
    text = str(memory_report(model()))
    lines = text.splitlines()
    assert lines[0].split() == ["parameter", "shape", "exp_avg", "exp_avg_sq", "gram", "basis", "other", "total"]
    assert any(line.startswith("3.weight") and "(10, 24)" in line for line in lines)
    assert any(line.startswith("total") for line in lines)


def test_frozen_parameters_have_no_state():
    net = model()
    net[0].requires_grad_(False)
    assert set(memory_report(net).shapes) == {name for name, p in net.named_parameters() if p.requires_grad}


def test_misuse():
    optimizer = SOAP(model().parameters())
    with pytest.raises(TypeError, match="takes no options with an optimizer, got merge_dims"):
        memory_report(optimizer, merge_dims=True)
    with pytest.raises(TypeError, match="SOAP has no option momentum"):
        memory_report(model(), momentum=0.9)
    with pytest.raises(TypeError, match="reports on soap_opt.SOAP, got Adam"):
        memory_report(torch.optim.Adam(model().parameters()))


@needs_engine
@pytest.mark.parametrize("threads", [1, 2])
def test_scratch_is_what_the_engine_allocates(threads):
    torch.set_num_threads(threads)
    shapes = [(64, 48, 5, 5), (40, 30), (7,)]
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = SOAP(params, fused=True)
    foretold = memory_report(optimizer).scratch
    cpu.release_scratch()
    for grads in random_gradients(shapes, 2):
        for param, grad in zip(params, grads):
            param.grad = grad
        optimizer.step()
    assert cpu.release_scratch() == foretold == memory_report(optimizer).scratch
    largest = 4 * max(torch.Size(shape).numel() for shape in shapes)
    # bounded: three buffers of the largest parameter, its matrices packed, and chunks of a fixed size, for each thread
    assert foretold <= threads * (3 * largest + 2 * 4 * 2 * 64**2 + (2 << 20))
    assert memory_report([torch.zeros(64, 48)], foreach=True).scratch == 0


@needs_engine
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(10_000, 2), (512, 512), (700, 40), (64, 48, 5, 5), (4, 4)], ids=str)
def test_scratch_is_what_is_documented(shape, threads):
    torch.set_num_threads(threads)
    widths = [-(-d // 16) * 16 for d in shape]
    widest = max(widths)
    elements = 3 * torch.Size(shape).numel() + sum(2 * d * d for d in widths if d <= 512)
    elements += max(2 * widest**2 + 640 * widest if widest <= 512 else 0, 784 * widest + (800 << 10) // 4)
    assert 0 < memory_report([torch.zeros(shape)], fused=True).scratch <= 4 * threads * (elements + 50_000)


def test_a_refresh_s_memory_is_told():
    threads = torch.get_num_threads()
    assert memory_report([torch.zeros(600, 3)]).refresh == (8 * 600 * 600 + threads * (272 * 600 + 143_616)) * 4
    assert memory_report([torch.zeros(100, 3)]).refresh == 8 * 100 * 100 * 4 * threads
    assert "while the largest basis is refreshed" in str(memory_report([torch.zeros(100, 3)]))
    assert memory_report([torch.zeros(7)]).refresh == 0


PEAK = """
import re, sys, torch
from soap_opt import memory_report
from soap_opt.refresh_operator import refresh_bases_

def highest():  # bytes
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

def refreshed(gram, basis):
    assert refresh_bases_([gram], [basis])[1].item() == 1

size, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
gram, basis = torch.diag(torch.rand(size)) + 1e-4, torch.eye(size)
refreshed(torch.eye(40), torch.eye(40))
start = highest()
refreshed(gram, basis)
results = 4 * size * size  # the rotation
print(highest() - start - results, memory_report([torch.zeros(size, 3)]).refresh)
"""


@needs_engine
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
@pytest.mark.parametrize(("size", "threads"), [(513, 16), (1500, 4)])
def test_a_large_refresh_takes_what_is_told(size, threads):
    run = subprocess.run([sys.executable, "-c", PEAK, str(size), str(threads)], capture_output=True, text=True, check=True)
    taken, told = map(int, run.stdout.split())
    assert told / 4 < taken <= told + 2**22  # (threads' stacks)


def test_groups_that_share_names_are_all_counted():
    encoder, decoder = (torch.nn.Linear(30, 20) for _ in range(2))
    optimizer = SOAP([{"params": list(net.named_parameters())} for net in (encoder, decoder)])
    one = memory_report(encoder)
    report = memory_report(optimizer)
    assert report.total == 2 * one.total
    assert list(report.by_parameter) == ["weight", "bias", "weight (2)", "bias (3)"]


def test_options_are_checked_as_soap_checks_them():
    net = torch.nn.Linear(3, 2)
    assert memory_report(net, amsgrad=False).total == memory_report(net).total
    with pytest.raises(TypeError, match="amsgrad"):
        memory_report(net, amsgrad=True)
    with pytest.raises(ValueError, match="Invalid max_precond_dim value: -1"):
        memory_report(net, max_precond_dim=-1)


def test_an_installed_version_is_known():
    assert soap_opt.__version__.count(".") == 2


def test_the_documentation_s_example_runs(capsys):
    page = (Path(__file__).parent.parent / "docs/api/diagnostics.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(example, names)
    printed = capsys.readouterr().out
    assert [row["step"] for row in names["meter"].records] == [5, 10, 15, 20]
    assert all(-1 <= row[name] <= 1 for row in names["meter"].records for name in ("raw", "preconditioned", "between_steps"))
    for column in ("between_steps", "max_over_median", "off_diagonal"):
        assert column in printed
