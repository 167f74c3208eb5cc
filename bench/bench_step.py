"""Whole steps on the gradients of a learned image compression model: ours, the reference, an installed peer and Adam.

pytest bench/bench_step.py -s [--save-results]
"""

from __future__ import annotations

import pytest
import torch
from pytorch_optimizer import SOAP as PytorchOptimizerSOAP

from soap_opt import SOAP

from .contest import Contest, save, table
from .models import compressai_problem
from .reference import ReferenceSOAP

CONTESTANTS = {
    "reference": lambda params: ReferenceSOAP(params),
    "pytorch_optimizer": lambda params: PytorchOptimizerSOAP(params, lr=3e-3),
    "soap_opt multi tensor, staggered": lambda params: SOAP(params, foreach=True),
    "soap_opt multi tensor, together": lambda params: SOAP(params, foreach=True, refresh="together"),
    "soap_opt multi tensor, adaptive": lambda params: SOAP(params, foreach=True, refresh="adaptive"),
    "soap_opt single tensor, staggered": lambda params: SOAP(params, foreach=False),
    "torch Adam foreach": lambda params: torch.optim.Adam(params, foreach=True),
    "torch Adam fused": lambda params: torch.optim.Adam(params, fused=True),
}
COLUMNS = (
    "optimizer",
    "median_ms",
    "p95_ms",
    "slowest_ms",
    "first_ms",
    "slowest_phase_over_median_phase",
    "ratio_to_reference",
    "ratio_to_pytorch_optimizer",
)


@pytest.mark.parametrize("model", ["bmshj2018-hyperprior"])
def test_step(benchmark, model: str, request: pytest.FixtureRequest) -> None:
    contest = Contest(compressai_problem(model), CONTESTANTS, baselines=("reference", "pytorch_optimizer"))
    # pytest-benchmark times whole rounds; what a single optimizer takes is in extra_info and in the table.
    benchmark.pedantic(contest.round, rounds=2 + 10 * request.config.getoption("--periods"), warmup_rounds=0)
    rows = contest.summary()
    benchmark.extra_info.update({str(row["optimizer"]): row for row in rows})
    print(f"\n\n{rows[0]['model']}, {rows[0]['parameters']:,} parameters, {torch.get_num_threads()} threads\n")
    print(table(rows, COLUMNS))
    if request.config.getoption("--save-results"):
        print("->", save(f"step_{model}", rows, f"pytest bench/bench_step.py -k {model} -s --save-results"))
