"""Cost per parameter and per tensor; the sweeps themselves are in growth.py: pytest bench/bench_growth.py -s"""

from __future__ import annotations

import pytest

from .growth import COLUMNS, by_parameters, by_tensors
from .peers import OTHERS, OURS
from .results import table


@pytest.mark.parametrize("sweep", [by_parameters, by_tensors])
def test_growth(benchmark, sweep) -> None:
    rows = benchmark.pedantic(sweep, args=([OURS[0], OTHERS[1]],), kwargs={"quick": True}, rounds=1)
    benchmark.extra_info["rows"] = rows
    print("\n\n" + table(rows, COLUMNS))
