"""Where the C++ engine's time goes, function by function: ``perf record`` around steps of one optimizer.

    python -m bench.perf --model bmshj2018-hyperprior --threads 1 [--before path/to/checkout] [-o perf]

Needs Linux's perf. Shares are of the samples in the engine and in libc's copies, those of the short start included; what torch,
LAPACK and Python take is not in them, nor what is below 0.3 %. Before is another checkout with an engine that was built in
place.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from . import processor
from .contest import WARMUP
from .models import MODELS
from .peers import OURS
from .results import ROOT, Row, save, significant, table
from .worker import Stepper

# What a function belongs to: the first pattern that its name matches. (Products, packing and copies are the refreshes' too.)
STAGES = {
    "products": "multiply_",
    "Grams": "gram|average_triangle|mirror",
    "packing and copies": "pack_|copy_runs|mem(move|cpy|set)|transpose",
    "Adam": "adam",
    "weight decay and application": "apply",
    "check of the gradient": "sum_squares",
    "refresh": "refresh|householder|orthogonal|permute|[Rr]eflect|panel",
}
REST = "rest of the engine"
STEPS = 200
LEAST = 0.3


def stage_of(function: str) -> str:
    return next((stage for stage, pattern in STAGES.items() if re.search(pattern, function)), REST)


def record(checkout: Path, model: str, threads: int, steps: int) -> list[Row]:
    """Steps of a checkout's engine in a process of its own; one row for each function of LEAST percent and more."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "perf.data")
        # bench is this one, and soap_opt, which its modules import, the checkout's
        code = "import sys, bench; sys.path.insert(0, sys.argv[1]); from bench.perf import steps_of; steps_of(*sys.argv[1:])"
        child = [sys.executable, "-c", code, str(checkout), model, str(threads), str(steps)]
        run = subprocess.run(
            ["perf", "record", "-q", "-F", "1999", "-o", data, "--", *child],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )
        if run.returncode != 0:
            raise RuntimeError(f"perf record ended with status {run.returncode}: {run.stderr[-2000:]}")
        step_ms = float(run.stdout.split()[-1])
        report = subprocess.run(
            ["perf", "report", "-q", "-i", data, "--no-children", "--percentage", "relative", "--sort", "symbol", "--stdio"]
            + ["--dsos", f"{engine_of(checkout).name},libc.so.6"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return [
        {
            "model": model,
            "version": version(checkout),
            "step_ms": significant(step_ms),
            "stage": stage_of(function),
            "function": function.replace("(anonymous namespace)::", "").replace("soap_opt::", ""),
            "percent": share,
        }
        for function, share in shares_in(report)
        if share >= LEAST
    ]


def shares_in(report: str) -> list[tuple[str, float]]:
    """(function, percent) of perf's report; its empty columns of cycles are left out."""
    found = re.findall(r"^ *([\d.]+)% +\[.\] (.+?)(?: +- +-)? *$", report, re.MULTILINE)
    return [(function, float(share)) for share, function in found]


def engine_of(checkout: Path) -> Path:
    """The engine of a checkout, built in place."""
    found = next((checkout / "soap_opt").glob("_C.*so"), None)
    if found is None:
        raise SystemExit(f"{checkout} has no engine: python setup.py build_ext --inplace")
    return found


def version(checkout: Path) -> str:
    """A checkout's commit, with + where files of the engine differ from it."""
    git = ["git", "-C", str(checkout)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "csrc"], capture_output=True, text=True).stdout
    return commit + "+" * bool(changed)


def by_stage(rows: Iterable[Row]) -> list[Row]:
    """Sums over a version's functions."""
    sums: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["version"], row["stage"])
        entry = sums.setdefault(key, {"version": key[0], "step_ms": row["step_ms"], "stage": key[1], "percent": 0.0})
        entry["percent"] = round(entry["percent"] + row["percent"], 2)
    return list(sums.values())


def steps_of(checkout: str, model: str, threads: str, steps: str) -> None:
    """What perf records: prints the median step in ms."""
    import soap_opt

    if not Path(soap_opt.__file__).is_relative_to(checkout):
        sys.exit(f"soap_opt comes from {soap_opt.__file__}, not from {checkout}")
    torch.set_num_threads(int(threads))
    problem = MODELS[model]()
    stepper = Stepper(problem.params, problem.grads, OURS[0].target, OURS[0].options)
    times = [stepper.step(k) for k in range(WARMUP + int(steps))][WARMUP:]
    print(statistics.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.perf", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="bmshj2018-hyperprior")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--before", type=Path, help="another checkout, recorded first")
    parser.add_argument("-o", "--output", metavar="NAME", help="write bench/results/KIND/NAME.csv")
    arguments = parser.parse_args()
    if shutil.which("perf") is None:
        parser.error("perf is not here (Debian: apt install linux-perf)")
    rows: list[Row] = []
    checkouts = [path.resolve() for path in (arguments.before, ROOT) if path is not None]
    for checkout in checkouts:
        engine_of(checkout)
    for checkout in checkouts:
        rows += record(checkout, arguments.model, arguments.threads, arguments.steps)
    print(table(by_stage(rows)))
    if arguments.output:
        print(save(arguments.output, rows, directory=processor.results(), threads=str(arguments.threads)))


if __name__ == "__main__":
    main()
