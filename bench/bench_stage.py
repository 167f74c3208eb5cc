"""Every stage of a step on its own: pytest bench/bench_stage.py --benchmark-columns=median,min,rounds"""

from __future__ import annotations

import pytest

from .stages import shape_cases, size_cases

OF_SHAPES = [("project", "python"), ("project back", "python"), ("gram", "python"), ("adam", "python")]
OF_SHAPES += [("step without refresh", "python"), ("step without refresh", "engine")]
OF_SIZES = [(stage, path) for stage in ("refresh", "init") for path in ("python", "engine")]


def run(benchmark, cases, stage: str, path: str) -> None:
    _, _, name, flops, moved, call = next(case for case in cases if case[:2] == (stage, path))
    benchmark.group = f"{stage}, {name}"
    benchmark(call)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {"gflops": flops and flops / seconds / 1e9, "gbytes_per_s": moved and moved / seconds / 1e9}


@pytest.mark.parametrize("shape", [(128, 128, 5, 5), (512, 512)])
@pytest.mark.parametrize("stage, path", OF_SHAPES)
def test_shape(benchmark, stage: str, path: str, shape: tuple[int, ...]) -> None:
    run(benchmark, shape_cases(shape), stage, path)


@pytest.mark.parametrize("size", [25, 192])
@pytest.mark.parametrize("stage, path", OF_SIZES)
def test_size(benchmark, stage: str, path: str, size: int) -> None:
    run(benchmark, size_cases(size), stage, path)
