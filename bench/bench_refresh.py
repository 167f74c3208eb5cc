"""The refresh on a GPU: this package's operator against torch.linalg.qr, one by one and batched. Skips itself without one.

    pytest bench/bench_refresh.py --benchmark-columns=median,min,rounds

The original does, for each matrix, two products for the estimates, argsort, a product and a QR; ``one by one`` is that.
``batched`` stacks equal sizes; torch forms Q of a batch one matrix after the other. MAGMA is tried where torch has it.
"""

from __future__ import annotations

import pytest
import torch

from soap_opt import _ext
from soap_opt.eigenbasis import gram_times_basis, refresh_basis

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(_ext._cuda_load_error is not None, reason=str(_ext._cuda_load_error)),
]

# name -> sizes of the matrices that are due together
SETS = {
    "1024 of 8": [8] * 1024,
    "256 of 32": [32] * 256,
    "128 of 64": [64] * 128,
    "64 of 128": [128] * 64,
    "64 of 192": [192] * 64,
    "132 of 224": [224] * 132,
    "16 of 512": [512] * 16,
    "4 of 1024": [1024] * 4,
    "1 of 2048": [2048],
    "bmshj2018-hyperprior q3": [128] * 48 + [192] * 4 + [5] * 24 + [3] * 22,
}


def problem(sizes: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    grams, bases = [], []
    for d in sizes:
        x = torch.randn(d, d + 2, generator=generator)
        grams.append((x @ x.T).cuda())
        bases.append(torch.linalg.qr(torch.randn(d, d, generator=generator)).Q.contiguous().cuda())
    return grams, bases


def ours(grams, bases):
    orders = [torch.empty(len(g), dtype=torch.int64, device="cuda") for g in grams]
    rotations = [torch.empty_like(g) for g in grams]
    outcomes = torch.empty(len(grams), dtype=torch.int32, device="cuda")
    return lambda: torch.ops.soap_opt.refresh_basis_(grams, bases, orders, rotations, outcomes)


def one_by_one(grams, bases):
    return lambda: [refresh_basis(q, *gram_times_basis(g, q)) for g, q in zip(grams, bases)]


def batched(grams, bases):
    alike: dict[int, list[int]] = {}
    for i, gram in enumerate(grams):
        alike.setdefault(len(gram), []).append(i)
    stacks = [(torch.stack([grams[i] for i in of]), torch.stack([bases[i] for i in of])) for of in alike.values()]
    return lambda: [refresh_basis(q, *gram_times_basis(g, q)) for g, q in stacks]


@pytest.fixture(params=["default", "magma", "cusolver"])
def library(request):
    before = torch.backends.cuda.preferred_linalg_library()
    if request.param == "magma" and not torch.cuda.has_magma:
        pytest.skip("this torch has no MAGMA")
    torch.backends.cuda.preferred_linalg_library(request.param)
    yield request.param
    torch.backends.cuda.preferred_linalg_library(before)


def measure(benchmark, call) -> None:
    def run() -> None:
        call()
        torch.cuda.synchronize()

    run()
    benchmark(run)
    benchmark.extra_info["device"] = torch.cuda.get_device_name()


@pytest.mark.parametrize("name", SETS)
def test_ours(benchmark, name) -> None:
    benchmark.group = name
    measure(benchmark, ours(*problem(SETS[name])))


@pytest.mark.parametrize("how", [one_by_one, batched])
@pytest.mark.parametrize("name", SETS)
def test_torch(benchmark, name, how, library) -> None:
    benchmark.group = name
    measure(benchmark, how(*problem(SETS[name])))
