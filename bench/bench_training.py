"""The optimizer's share of a training step, on one period of steps: pytest bench/bench_training.py -s"""

from __future__ import annotations

from .peers import OTHERS, OURS
from .results import table
from .training import measure


def test_training(benchmark) -> None:
    rows = benchmark.pedantic(measure, args=([OURS[0], OTHERS[1]],), kwargs={"periods": 1}, rounds=1)
    benchmark.extra_info["rows"] = rows
    print("\n\n" + table(rows))
