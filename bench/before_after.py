"""Steps of another checkout's engine and of this one's in turn, on the same gradients.

    python -m bench.before_after path/to/checkout [--model MODEL ..] [--threads N] [-o before_after]

Both run in processes of their own (worker.py). Who steps first changes with every round; ratios are medians of those of single
rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from . import processor
from .contest import PERIOD, WARMUP, GemmRate, quiet
from .models import MODELS, Problem
from .peers import OURS, RemoteStepper
from .perf import HERE, engine_of, version
from .results import Row, save, significant, table

USUAL = ["bmshj2018-hyperprior", "mbt2018-mean", "512-table", "gpt2-block", "2000-tensors-4x4"]


def python_with(checkout: Path, folder: Path, name: str) -> str:
    """An interpreter, this one, that imports soap_opt from a checkout."""
    script = folder / name
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{checkout}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(script)


def measure(problem: Problem, checkouts: dict[str, Path], rounds: int) -> Row:
    """Medians of `rounds` steady rounds of before and after."""
    with tempfile.TemporaryDirectory() as folder:
        steppers = {
            name: RemoteStepper(replace(OURS[0], name=name, python=python_with(checkout, Path(folder), name)), problem)
            for name, checkout in checkouts.items()
        }
        times: dict[str, list[float]] = {name: [] for name in steppers}
        gemm, rates = GemmRate(), []
        for k in range(WARMUP + rounds):
            rates.append(gemm.measure())
            for name in sorted(steppers, reverse=k % 2 == 0):
                times[name].append(steppers[name].step(k))
        for stepper in steppers.values():
            stepper.close()
    before, after = (times[name][WARMUP:] for name in ("before", "after"))
    return {
        "model": problem.name,
        "before": version(checkouts["before"]),
        "after": version(checkouts["after"]),
        "before_ms": significant(statistics.median(before)),
        "after_ms": significant(statistics.median(after)),
        "after_over_before": significant(statistics.median(b / a for a, b in zip(before, after)), 3),
        "rounds": rounds,
        "quiet": quiet(rates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.before_after", description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="another checkout, its engine built in place")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="repeatable (default: five)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--periods", type=int, default=4, help="of ten steps (default: %(default)s)")
    parser.add_argument("-o", "--output", metavar="NAME", help="write bench/results/KIND/NAME.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkouts = {"before": arguments.checkout.resolve(), "after": HERE}
    for checkout in checkouts.values():
        engine_of(checkout)
    os.environ.pop("PYTHONPATH", None)
    rows = []
    for model in arguments.model or USUAL:
        rows.append(measure(MODELS[model](), checkouts, PERIOD * arguments.periods))
        print(table(rows[-1:]), flush=True)
    if arguments.output:
        print(save(arguments.output, rows, directory=processor.results()).name)


if __name__ == "__main__":
    main()
