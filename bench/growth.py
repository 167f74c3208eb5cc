"""Suite "growth": cost per parameter as a model grows at a fixed layer width, and per tensor as tensors grow in number."""

from __future__ import annotations

from collections.abc import Sequence

from .contest import Contest
from .models import drawn
from .peers import Contestant
from .results import Row, significant

WIDTH = 256
MILLIONS = (1, 3, 10, 30, 100)
TENSORS = (1, 10, 100, 1000, 5000)
COLUMNS = ("model", "parameters", "optimizer", "median_ms", "ns_per_parameter", "us_per_tensor", "over_first")


def by_parameters(contestants: Sequence[Contestant], quick: bool = False) -> list[Row]:
    """Layers of WIDTH x WIDTH, more and more of them: ns per parameter."""
    rows: list[Row] = []
    for millions in MILLIONS[:3] if quick else MILLIONS:
        layers = round(1e6 * millions / WIDTH**2)
        rows += _sweep(f"{layers} of {WIDTH}x{WIDTH}", [(WIDTH, WIDTH)] * layers, contestants, 3 if quick else 10)
    return rows


def by_tensors(contestants: Sequence[Contestant], quick: bool = False) -> list[Row]:
    """Tensors of 4 x 4, more and more of them: us per tensor, next to nothing of which is arithmetic."""
    rows: list[Row] = []
    for tensors in TENSORS:
        rows += _sweep(f"{tensors} of 4x4", [(4, 4)] * tensors, contestants, 3 if quick else 20)
    return rows


def _sweep(name: str, shapes: list[tuple[int, ...]], contestants: Sequence[Contestant], rounds: int) -> list[Row]:
    contest = Contest(drawn(name, shapes, batches=1), contestants)
    contest.run(rounds)
    contest.close()
    rows = contest.summary()
    for row in rows:
        row["tensors"] = len(shapes)
        row["ns_per_parameter"] = significant(1e6 * row["median_ms"] / row["parameters"])
        row["us_per_tensor"] = significant(1e3 * row["median_ms"] / len(shapes))
    return rows
