"""Every stage of a step on its own: pytest bench/bench_stage.py --benchmark-columns=median,min,rounds"""

from __future__ import annotations

import pytest

from .stages import cases

CASES = list(cases(shapes=((128, 128, 5, 5), (512, 512)), sizes=(25, 192)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case[:3]).replace(" ", "_"))
def test_stage(benchmark, case) -> None:
    stage, path, shape, flops, moved, call = case
    benchmark.group = f"{stage}, {shape}"
    benchmark(call)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {"gflops": flops and flops / seconds / 1e9, "gbytes_per_s": moved and moved / seconds / 1e9}
