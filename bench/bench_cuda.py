"""What a step on a GPU must reach; skips itself without one (it has not been run on one yet).

python -m pytest bench/bench_cuda.py -s          (cuda_steps.py writes the tables: python -m bench.cuda_steps -o cuda_steps)
"""

from __future__ import annotations

import pytest
import torch

from .cuda_steps import contest, contestants, to
from .models import MODELS
from .results import table


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("model", ["bmshj2018-hyperprior", "bmshj2018-factorized"])
def test_steps(model):
    rows = contest(to(MODELS[model](), "cuda"), contestants("cuda", []), rounds=60)
    print(f"\n{torch.cuda.get_device_name()}\n{table(rows)}")
    of = {row["optimizer"]: row for row in rows}
    assert of["bench/reference.py"]["median_ms"] >= 20 * of["soap_opt fused"]["median_ms"]
    assert of["soap_opt fused"]["slowest_phase_over_median"] <= 1.5
