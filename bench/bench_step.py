"""Whole steps of every contestant, interleaved: pytest bench/bench_step.py -s [--peer heavyball=path/to/python]"""

from __future__ import annotations

import pytest
import torch

from .__main__ import STEP_COLUMNS
from .contest import PERIOD, WARMUP, Contest
from .models import MODELS
from .peers import INSTALLED, OTHERS, OURS, STRAIGHTFORWARD, parse_peer
from .results import table


@pytest.mark.parametrize("model", ["bmshj2018-factorized", "bmshj2018-hyperprior", "2000-tensors-4x4"])
def test_step(benchmark, model: str, request: pytest.FixtureRequest) -> None:
    peers = [parse_peer(text) for text in request.config.getoption("--peer")]
    contest = Contest(MODELS[model](), [*OURS, STRAIGHTFORWARD, *INSTALLED, *peers, *OTHERS])
    # pytest-benchmark times whole rounds; what a single optimizer takes is in extra_info and in the table.
    benchmark.pedantic(contest.round, rounds=WARMUP + PERIOD, warmup_rounds=0)
    contest.close()
    rows = contest.summary()
    benchmark.extra_info.update({str(row["optimizer"]): row for row in rows})
    print(f"\n\n{rows[0]['model']}, {rows[0]['parameters']:,} parameters, {torch.get_num_threads()} threads\n")
    print(table(rows, STEP_COLUMNS))
