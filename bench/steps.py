"""Whole steps: ours against peers on every model (suite "step"), and the first step, init (suite "init")."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .contest import Contest, GemmRate, quiet, spike_bound
from .models import LIC_MODELS, MODELS, Problem
from .peers import Contestant
from .results import Row, significant

LEADERS = ("Adam fused",)  # goes on with ours when the slow ones have stopped


@dataclass(frozen=True)
class Rounds:
    """How long a model is measured: steady rounds of everybody, and of ours and LEADERS; who is left out."""

    everybody: int
    ours: int
    without: tuple[str, ...] = ()


# Where a step takes a second: variants of ours that the other models show
LESS = ("soap_opt multi tensor, together", "soap_opt single tensor")
ROUNDS = {
    "bmshj2018-factorized": Rounds(80, 80),
    "bmshj2018-hyperprior": Rounds(80, 80),
    "mbt2018-mean": Rounds(20, 80),
    "cheng2020-anchor": Rounds(20, 80),
    "elic2022-official": Rounds(20, 80, LESS),
    "gpt2-block": Rounds(6, 20, LESS),
    "512-table": Rounds(10, 40),
    "resnet50": Rounds(6, 20, LESS),
    "2000-tensors-4x4": Rounds(20, 80),
}
QUICK = Rounds(3, 10)


def file_of(model: str, threads: int = 0) -> str:
    """Name of a model's results; those with one thread stand beside those with all of the machine's (0)."""
    return f"step_{model}" + ("_one-thread" if threads == 1 else "")


def contest(model: str, contestants: Sequence[Contestant], quick: bool = False) -> tuple[list[Row], Contest]:
    """Run one model's contest; its rows, and the contest with the single times."""
    rounds = ROUNDS[model]
    entries = [contestant for contestant in contestants if contestant.name not in rounds.without]
    result = Contest(MODELS[model](), entries)
    if quick:
        result.run(QUICK.ours, QUICK.everybody, LEADERS)
    else:
        result.run(rounds.ours, rounds.everybody, LEADERS)
    result.close()
    rows = result.summary()
    rows[0] |= spike_bound(result.problem, float(rows[0]["median_ms"]))
    return rows, result


INIT_MODELS = (*LIC_MODELS, "2000-tensors-4x4")


def first_steps(problem: Problem, contestants: Sequence[Contestant], repeats: int) -> list[Row]:
    """The first step of fresh optimizers, in turn; the first round warms up and is not counted. Ratios as in a contest."""
    entries = [c for c in contestants if c.applies_to(problem) and c.python is None]
    times: dict[str, list[float]] = {contestant.name: [] for contestant in entries}
    gemm, rates = GemmRate(), []
    for repeat in range(repeats + 1):
        rates.append(gemm.measure())
        for contestant in entries:
            milliseconds = contestant.stepper(problem).step(0)
            if repeat > 0:
                times[contestant.name].append(milliseconds)
    base = times[entries[0].name]
    return [
        {
            "model": problem.name,
            "optimizer": contestant.name,
            "kind": contestant.kind,
            "median_ms": significant(statistics.median(times[contestant.name])),
            "over_first": significant(statistics.median(a / b for a, b in zip(times[contestant.name], base)), 3),
            "repeats": repeats,
            "quiet": quiet(rates),
        }
        for contestant in entries
    ]
