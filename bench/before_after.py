"""Steps of another checkout's engine and of this one's in turn, on the same gradients.

    python -m bench.before_after path/to/checkout [--model MODEL ..] [--threads N] [-o before_after]

A contest (contest.py) of two that run in processes of their own (worker.py).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from . import processor
from .contest import PERIOD, Contest
from .models import MODELS, Problem
from .peers import OURS
from .perf import engine_of, version
from .results import ROOT, Row, save, table

USUAL = ["bmshj2018-hyperprior", "mbt2018-mean", "512-table", "gpt2-block", "resnet50", "2000-tensors-4x4"]


def python_with(checkout: Path, folder: Path, name: str) -> str:
    """An interpreter, this one, that imports soap_opt from a checkout."""
    script = folder / name
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{checkout}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(script)


def measure(problem: Problem, checkouts: dict[str, Path], periods: int) -> Row:
    """Steady rounds of before and after: medians, means of whole periods (with all refreshes), slowest places in a period."""
    with tempfile.TemporaryDirectory() as folder:
        entries = [
            replace(OURS[0], name=name, python=python_with(checkout, Path(folder), name))
            for name, checkout in checkouts.items()
        ]
        contest = Contest(problem, entries)
        contest.run(PERIOD * periods)
        contest.close()
    before, after = contest.summary()
    return {
        "model": problem.name,
        "before": version(checkouts["before"]),
        "after": version(checkouts["after"]),
        "before_ms": before["median_ms"],
        "after_ms": after["median_ms"],
        "after_over_before": after["over_first"],
        "before_mean_ms": before["mean_ms"],
        "after_mean_ms": after["mean_ms"],
        "before_slowest_phase_over_median": before["slowest_phase_over_median"],
        "after_slowest_phase_over_median": after["slowest_phase_over_median"],
        "rounds": after["steps"],
        "quiet": after["quiet"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.before_after", description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="another checkout, its engine built in place")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="repeatable (default: six)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--periods", type=int, default=4, help="of ten steps (default: %(default)s)")
    parser.add_argument("-o", "--output", metavar="NAME", help="write bench/results/KIND/NAME.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkouts = {"before": arguments.checkout.resolve(), "after": ROOT}
    for checkout in checkouts.values():
        engine_of(checkout)
    os.environ.pop("PYTHONPATH", None)
    rows = []
    for model in arguments.model or USUAL:
        rows.append(measure(MODELS[model](), checkouts, arguments.periods))
        print(table(rows[-1:]), flush=True)
    if arguments.output:
        print(save(arguments.output, rows, directory=processor.results()).name)


if __name__ == "__main__":
    main()
