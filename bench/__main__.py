"""``python -m bench SUITE``: measure, print Markdown tables, write bench/results/. See README.md beside this file."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from . import decay, growth, memory, must_reach, processor, stages, steps, training
from .models import MODELS
from .peers import INSTALLED, OTHERS, OURS, STRAIGHTFORWARD, Contestant, parse_peer, parse_reference
from .results import Row, save, table

STEP_COLUMNS = (
    "optimizer",
    "median_ms",
    "mean_ms",
    "p95_ms",
    "slowest_ms",
    "first_ms",
    "over_first",
    "share_of_floor_128x128x3200",
    "share_of_floor_1024^3",
    "slowest_phase_over_median",
    "steps",
)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    if arguments.suite != "must-reach":
        print(processor.describe(), flush=True)
    chosen = {"all": list(SUITES), "processor": []}.get(arguments.suite, [arguments.suite])
    for suite in chosen:
        SUITES[suite](arguments)
    print(f"\n{time.perf_counter() - started:.0f} s", file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "suite",
        choices=["all", "processor", *SUITES],
        help="what to measure; must-reach only reads the results, processor only says what this machine is",
    )
    parser.add_argument("--model", action="append", choices=list(MODELS), help="step: only this model (repeatable)")
    parser.add_argument(
        "--peer",
        action="append",
        type=_checked(parse_peer),
        default=[],
        metavar="NAME=PYTHON[@MODULE:CLASS[@JSON]]",
        help="another optimizer in an interpreter of its own, e.g. heavyball=path/to/venv/bin/python",
    )
    parser.add_argument(
        "--reference", type=_checked(parse_reference), metavar="FILE.py:CLASS", help="the original SOAP, or any other file's"
    )
    parser.add_argument("--ours", action="store_true", help="leave out the other SOAPs, but those of --peer and --reference")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="few rounds, and nothing is written: does it work?")
    return parser.parse_args()


def _checked(convert):
    def checked(text: str) -> Contestant:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


def contestants(arguments: argparse.Namespace) -> list[Contestant]:
    given = [arguments.reference] if arguments.reference else []
    usual = [] if arguments.ours else [STRAIGHTFORWARD, *INSTALLED]
    return [*OURS, *given, *usual, *arguments.peer, *OTHERS]


def report(arguments: argparse.Namespace, name: str, rows: list[Row], columns=None, nested=None, **extra: str) -> None:
    print(table(rows, columns), flush=True)
    if not arguments.quick:
        path = save(name, rows, nested, processor.results(), **extra)
        print(f"\n-> {path.relative_to(path.parents[1])}", flush=True)


def run_step(arguments: argparse.Namespace) -> None:
    for model in arguments.model or MODELS:
        rows, contest = steps.contest(model, contestants(arguments), arguments.quick)
        first = rows[0]
        print(f"\n### {first['model']}: {first['parameters']:,} parameters, floor {first['floor_gflop']} GF\n")
        report(arguments, steps.file_of(model, arguments.threads), rows, STEP_COLUMNS, contest.raw(), peers=contest.versions)
        rates = ", ".join(f"{shape} {first[f'gemm_gflops_{shape}']}" for shape in contest.gemm.SHAPES)
        print(f"\ngemm GF/s: {rates}; median / best {first['quiet']}; {torch.get_num_threads()} threads")
        if first["quiet"] < must_reach.QUIET:
            print("WARNING: something else was running; measure again on a quiet machine")
        if "largest_unit" in first:
            print(
                f"slowest phase / median {first['slowest_phase_over_median']}; bound with the largest unit, "
                f"{first['largest_unit']} elements: counted {first['bound_counted']}, measured {first['bound_measured']}"
            )


def run_init(arguments: argparse.Namespace) -> None:
    print("\n### First step (init)\n")
    rows: list[Row] = []
    entries = [c for c in contestants(arguments) if c.kind != "other"]
    for model in arguments.model or steps.INIT_MODELS:
        rows += steps.first_steps(MODELS[model](), entries, 1 if arguments.quick else 5)
    report(arguments, "init", rows)


def run_stage(arguments: argparse.Namespace) -> None:
    print("\n### Stages\n")
    report(arguments, "stage", stages.measure(arguments.quick))


def run_growth(arguments: argparse.Namespace) -> None:
    fused, _, multi, *_ = OURS
    adam_fused = OTHERS[1]
    print("\n### Growth at a layer width of 256\n")
    report(arguments, "growth_parameters", growth.by_parameters([fused, adam_fused], arguments.quick), growth.COLUMNS)
    print("\n### Growth in the number of tensors\n")
    rows = growth.by_tensors([fused, multi, *INSTALLED, adam_fused], arguments.quick)
    report(arguments, "growth_tensors", rows, growth.COLUMNS)


def run_memory(arguments: argparse.Namespace) -> None:
    print("\n### Memory\n")
    models = arguments.model or memory.MEMORY_MODELS[: 1 if arguments.quick else None]
    report(arguments, "memory", memory.measure(models, contestants(arguments)))


def run_training(arguments: argparse.Namespace) -> None:
    print("\n### The optimizer's share of a training step\n")
    entries = [OURS[0], arguments.reference or STRAIGHTFORWARD, OTHERS[1]]
    rows = training.measure(entries, 1 if arguments.quick else 2)
    report(arguments, "training", rows)
    print("\n### Where a step's time goes\n")
    parts: list[Row] = []
    for model in training.PROFILED[: 1 if arguments.quick else None]:
        training_step = rows[0]["training_step_ms"] if model == training.MODEL else None
        parts += training.profile(model, OURS[0], training_step, 1 if arguments.quick else 3)
    report(arguments, "profile", parts)


def run_decay(arguments: argparse.Namespace) -> None:
    print("\n### Gradients that have become 0\n")
    report(arguments, "decay", decay.measure([*OURS, *INSTALLED, OTHERS[0]], arguments.quick))


def run_must_reach(arguments: argparse.Namespace) -> None:
    print("\n### Must reach\n")
    print(must_reach.every(must_reach.rows) if arguments.quick else must_reach.write_into_page())


SUITES = {
    "step": run_step,
    "init": run_init,
    "stage": run_stage,
    "growth": run_growth,
    "memory": run_memory,
    "training": run_training,
    "decay": run_decay,
    "must-reach": run_must_reach,
}

if __name__ == "__main__":
    main()
