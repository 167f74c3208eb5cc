"""Optimizers side by side: one step of each in turn, on the same gradients, so that a noisy machine is noisy for all.

Interleaving also leaves the caches as cold as training leaves them: between two steps of one optimizer lie the others'.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence

import torch

from soap_opt.refresh_operator import refresh_bases_
from soap_opt.schedule import unit_flops

from .models import Problem
from .peers import Contestant, peer_versions
from .results import Row, significant

PERIOD = 10  # steps in a refresh period; a *phase* is a step's place in it
WARMUP = 2  # init; and the first steady step, which fills caches and thread pools


class GemmRate:
    """The machine's float32 gemm rate: C = A B by torch.mm(out=), the quickest of a few calls back to back.

    The quickest, because a disturbance that slows the gemm down must not make an optimizer look good: a busy second core
    halves the rate of the short product, which needs both, sooner than that of a step. (On a quiet machine it is 5 % above
    the mean.)
    """

    SHAPES = {"128x128x3200": (128, 128, 3200, 20), "1024^3": (1024, 1024, 1024, 3)}  # m, k, n, calls

    def __init__(self) -> None:
        self.operands = {
            name: (torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)) for name, (m, k, n, _) in self.SHAPES.items()
        }

    def measure(self) -> dict[str, float]:
        """GF/s for each of SHAPES: flops 2 m k n over the time of the quickest call."""
        rates = {}
        for name, (m, k, n, calls) in self.SHAPES.items():
            a, b, c = self.operands[name]
            seconds = []
            for _ in range(calls):
                start = time.perf_counter()
                torch.mm(a, b, out=c)
                seconds.append(time.perf_counter() - start)
            rates[name] = 2e-9 * m * k * n / min(seconds)
        return rates


def quiet(rates: Sequence[dict[str, float]]) -> float:
    """Median over best gemm rate (1024^3) of all rounds: 0.95 and more on a machine that does nothing else."""
    large = [rate["1024^3"] for rate in rates]
    return significant(statistics.median(large) / max(large), 2)


class Contest:
    """Steps every optimizer on its own copy of the problem's parameters and keeps the times, round by round.

    Args:
        problem: parameters and gradients.
        contestants: the first is the one that the others are compared with.
    """

    def __init__(self, problem: Problem, contestants: Sequence[Contestant]) -> None:
        self.problem = problem
        self.contestants = [contestant for contestant in contestants if contestant.applies_to(problem)]
        self.steppers = {contestant.name: contestant.stepper(problem) for contestant in self.contestants}
        self.milliseconds: dict[str, list[float]] = {name: [] for name in self.steppers}
        self.gemm = GemmRate()
        self.gemm_rates: list[dict[str, float]] = []
        self.versions = peer_versions(self.contestants, self.steppers)

    def round(self, names: Iterable[str] | None = None) -> None:
        """The gemm rate, then one step of every optimizer (or of those named); a new one begins in every round."""
        k = len(self.gemm_rates)
        names = list(names or self.steppers)
        self.gemm_rates.append(self.gemm.measure())
        for name in names[k % len(names) :] + names[: k % len(names)]:
            self.milliseconds[name].append(self.steppers[name].step(k))

    def run(self, rounds: int, all_rounds: int | None = None, leaders: Iterable[str] = ()) -> None:
        """``rounds`` steady rounds; after ``all_rounds`` of them only the first contestant and ``leaders`` go on."""
        all_rounds = rounds if all_rounds is None else min(rounds, all_rounds)
        for _ in range(WARMUP + all_rounds):
            self.round()
        for name in [name for name in self.steppers if name != self.contestants[0].name and name not in leaders]:
            self.steppers.pop(name).close()  # their memory too
        for _ in range(rounds - all_rounds):
            self.round()

    def close(self) -> None:
        for stepper in self.steppers.values():
            stepper.close()

    def summary(self) -> list[Row]:
        """One row for each contestant. Times in ms; ratios and shares are medians of those of single rounds.

        The WARMUP rounds count only as ``first_ms``. The mean is over whole periods, where there is one: with all refreshes.
        A phase's time is its median over whole periods. ``over_first``: time
        over that of the first contestant. ``share_of_floor``: 2.5 U flops over the time and over the gemm rate of the round.
        """
        base = self.milliseconds[self.contestants[0].name][WARMUP:]
        rows = []
        for contestant in self.contestants:
            times = self.milliseconds[contestant.name]
            steady = times[WARMUP:]
            periods = len(steady) // PERIOD
            phases = phase_medians(steady)
            row: Row = {
                "model": self.problem.name,
                "parameters": self.problem.numel,
                "optimizer": contestant.name,
                "kind": contestant.kind,
                "median_ms": significant(statistics.median(steady)),
                "mean_ms": significant(statistics.mean(steady[: periods * PERIOD or None])),
                "p95_ms": significant(statistics.quantiles(steady, n=20, method="inclusive")[-1]),
                "slowest_ms": significant(max(steady)),
                "first_ms": significant(times[0]),
                "over_first": significant(statistics.median(a / b for a, b in zip(steady, base)), 3),
                "steps": len(steady),
                "periods": periods,
                "slowest_phase_over_median": significant(max(phases) / statistics.median(phases), 3) if phases else None,
            }
            for shape in GemmRate.SHAPES:
                row[f"share_of_floor_{shape}"] = None if contestant.kind == "other" else self._share(steady, shape)
            rows.append(row)
        for row in rows:
            for shape in GemmRate.SHAPES:
                row[f"gemm_gflops_{shape}"] = significant(statistics.median(rates[shape] for rates in self.gemm_rates))
            row["quiet"] = quiet(self.gemm_rates)
            row["floor_gflop"] = significant(self.problem.floor_flops / 1e9)
        return rows

    def _share(self, steady: list[float], shape: str) -> float:
        floor = self.problem.floor_flops
        rates = [rates[shape] for rates in self.gemm_rates[WARMUP:]]
        return significant(statistics.median(floor / (1e6 * ms) / rate for ms, rate in zip(steady, rates)), 3)

    def raw(self) -> dict[str, object]:
        """Every single time (ms) and gemm rate (GF/s), in order of the rounds."""
        return {
            "model": self.problem.name,
            "milliseconds": {name: [significant(ms) for ms in times] for name, times in self.milliseconds.items()},
            "gemm_gflops": {s: [significant(rates[s]) for rates in self.gemm_rates] for s in GemmRate.SHAPES},
        }


def phase_medians(steady: Sequence[float]) -> list[float]:
    """[PERIOD] medians over whole periods, or nothing when there is none."""
    whole = len(steady) // PERIOD * PERIOD
    return [statistics.median(steady[i:whole:PERIOD]) for i in range(PERIOD)] if whole else []


def spike_bound(problem: Problem, steady_ms: float) -> Row:
    """The bound of design.md section 5 on a step of ``refresh="staggered"``: 1 + (largest unit) / (steady step).

    Counted: in flops, the step as 2.5 U and its tenth of all refreshes. Measured: the unit's refresh on this machine, with the
    rotation that turns m, over the median step.
    """
    if not problem.units:
        return {}
    flops = [refresh_flops(numel, d) for numel, d in problem.units]
    largest = max(range(len(flops)), key=flops.__getitem__)
    numel, d = problem.units[largest]
    return {
        "largest_unit": f"{d} of {numel}",
        "bound_counted": significant(1 + flops[largest] / (problem.floor_flops + sum(flops) / PERIOD), 3),
        "bound_measured": significant(1 + unit_milliseconds(numel, d) / steady_ms, 3),
    }


def refresh_flops(numel: int, d: int) -> float:
    """Flops of refreshing one mode as the engine does: without the rotation Q^T Q' (:func:`soap_opt.schedule.unit_flops` has it
    always) where turning m by Q^T and by Q' takes fewer."""
    return unit_flops(numel, d) - max(0.0, 2.0 * d**3 - 2.0 * d * numel)


def unit_milliseconds(numel: int, d: int, repeats: int = 3) -> float:
    """Median time of refreshing one mode of size d of a parameter with ``numel`` elements: basis, and m turned into it."""
    x = torch.randn(d, d)
    gram, basis = x @ x.T / d, torch.linalg.qr(torch.randn(d, d)).Q.contiguous()
    moment = torch.randn(numel // d, d)
    out, times = torch.empty_like(moment), []
    for _ in range(repeats):
        start = time.perf_counter()
        refreshed, _ = refresh_bases_([gram], [basis])
        torch.mm(moment, refreshed[0].rotation, out=out)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
