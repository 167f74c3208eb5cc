"""Optimizers side by side: one step of each in turn, on the same gradients, so that a noisy machine is noisy for all.

Interleaving also leaves the caches as cold as training leaves them: between two steps of one optimizer lie the others'.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from .models import Problem

RESULTS = Path(__file__).parent / "results"


class Contest:
    """Steps every optimizer on its own copy of the problem's parameters and keeps the times.

    Args:
        problem: parameters and gradients.
        contestants: name -> a function that makes an optimizer of a list of parameters.
        baseline: the contestants that ratios are given against.
        period: steps in a refresh period; a *phase* is a step's place in it.
    """

    def __init__(
        self,
        problem: Problem,
        contestants: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]],
        baselines: Iterable[str],
        period: int = 10,
    ) -> None:
        self.problem, self.baselines, self.period = problem, tuple(baselines), period
        self.entries = {}
        for name, make in contestants.items():
            params = [torch.nn.Parameter(p.clone()) for p in problem.params]
            self.entries[name] = (params, make(params))
        self.milliseconds: dict[str, list[float]] = {name: [] for name in contestants}

    def round(self) -> None:
        """One step of every optimizer."""
        step = len(next(iter(self.milliseconds.values())))
        grads = self.problem.grads[step % len(self.problem.grads)]
        for name, (params, optimizer) in self.entries.items():
            for p, grad in zip(params, grads):
                p.grad = grad
            start = time.perf_counter()
            optimizer.step()
            self.milliseconds[name].append(1e3 * (time.perf_counter() - start))

    def summary(self) -> list[dict[str, object]]:
        """One row for each contestant. Times in ms; ratios are medians of the ratios of single rounds.

        The first two rounds (init; the first steady step, which fills caches and thread pools) count only as ``first``. Phases
        are taken over whole periods: a phase's time is its median over them.
        """
        rows = []
        for name, times in self.milliseconds.items():
            steady = times[2:]
            periods = len(steady) // self.period
            phases = [statistics.median(steady[i : periods * self.period : self.period]) for i in range(self.period)]
            row: dict[str, object] = {
                "model": self.problem.name,
                "parameters": self.problem.numel,
                "optimizer": name,
                "median_ms": round(statistics.median(steady), 2),
                "p95_ms": round(statistics.quantiles(steady, n=20)[-1], 2),
                "slowest_ms": round(max(steady), 2),
                "first_ms": round(times[0], 2),
                "slowest_phase_over_median_phase": round(max(phases) / statistics.median(phases), 3),
                "periods": periods,
            }
            for baseline in self.baselines:
                others = self.milliseconds[baseline][2:]
                row[f"ratio_to_{baseline}"] = round(statistics.median(a / b for a, b in zip(steady, others)), 3)
            rows.append(row)
        return rows


def environment() -> dict[str, str]:
    """Device, versions, threads and date: what a figure means without which it means nothing."""
    try:
        from cpuinfo import get_cpu_info

        cpu = get_cpu_info().get("brand_raw", platform.machine())
    except ImportError:
        cpu = platform.machine()
    versions = {}
    for package in ("soap_opt", "torch", "pytorch_optimizer", "compressai"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    return {
        "device": cpu,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **versions,
        "date": datetime.date.today().isoformat(),
    }


def table(rows: list[dict[str, object]], columns: Iterable[str]) -> str:
    """Rows as a Markdown table."""
    columns = list(columns)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def save(name: str, rows: list[dict[str, object]], command: str) -> Path:
    """Write rows with the environment and the command that made them to results/NAME.csv."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    extra = {**environment(), "command": command}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *extra])
        writer.writeheader()
        writer.writerows({**row, **extra} for row in rows)
    return path
