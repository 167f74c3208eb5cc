"""A steady step and every phase of a refresh period on a GPU; skips itself without one (it has not been run on one yet).

``python -m pytest bench/bench_cuda.py -s``
"""

from __future__ import annotations

import statistics

import pytest
import torch

from soap_opt import SOAP

from .cuda_model import MODELS
from .reference import ReferenceSOAP

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CONTESTANTS = {
    "fused": lambda params: SOAP(params, fused=True),
    "multi tensor": lambda params: SOAP(params, foreach=True),
    "original SOAP": ReferenceSOAP,
    "Adam(fused=True)": lambda params: torch.optim.Adam(params, fused=True),
}


def milliseconds(optimizer: torch.optim.Optimizer) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    optimizer.step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@pytest.mark.parametrize("model", MODELS)
def bench_steps(model):
    print(f"\n{model}, {torch.cuda.get_device_name()}: ms a step, median of each phase of 10")
    medians = {}
    for name, make in CONTESTANTS.items():
        params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in MODELS[model]()]
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer = make(params)
        times = [milliseconds(optimizer) for _ in range(61)][11:]  # init, compilation, first refreshes
        phases = [statistics.median(times[phase::10]) for phase in range(10)]
        medians[name] = statistics.median(phases)
        print(f"  {name:18s} {medians[name]:9.3f}   slowest phase {max(phases) / medians[name]:.2f} x")
    assert medians["original SOAP"] > medians["fused"]
