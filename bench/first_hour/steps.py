"""Whole steps of everybody alone on the GPU: a process for each optimizer, which takes one model after the other.

    python -m bench.first_hour.steps [--device cpu --quick]

Written like bench/cuda_steps.py's table, whose steppers these are; there everybody steps in turn in one process.
"""

from __future__ import annotations

import argparse
import sys

from ..cuda_steps import ADAM, GRAPH, alone, contestants, to, with_ratios
from ..models import Problem, drawn
from ..peers import STRAIGHTFORWARD, Contestant
from ..results import Row
from .common import Pieces, make_parser, passed_on, say_key, seconds_left, triton_path, write
from .gradients import problem_of
from .in_turn import Entry, in_turn, report, wait_for_turn

MODELS = ("bmshj2018-hyperprior", "2000-tensors-4x4", "gpt2-block", "elic2022-official")
OURS = "soap_opt fused"
NAMES = (
    OURS,
    GRAPH,
    "soap_opt multi tensor",
    ADAM.name,
    STRAIGHTFORWARD.name,
    "pytorch_optimizer SOAP",
    "soap_opt fused, TF32 projections",
)
QUICK_NAMES = (OURS, ADAM.name)
ROUNDS, QUICK_ROUNDS = 60, 3


def problems(arguments: argparse.Namespace) -> dict[str, Problem]:
    if arguments.quick:
        return {"tiny": drawn("tiny", [(20, 12), (6, 5, 3, 3), (7,)])}
    return {model: problem_of(model, arguments.gradients) for model in MODELS}


def entries(arguments: argparse.Namespace) -> dict[str, Contestant]:
    names = QUICK_NAMES if arguments.quick and not arguments.all else NAMES
    return {each.name: each for each in contestants(arguments.device, []) if each.name in names}


def measure(name: str, arguments: argparse.Namespace) -> int:
    """One optimizer on every model; a row for each as it is found."""
    contestant, pieces = entries(arguments)[name], Pieces()
    of_model = problems(arguments)
    seconds = wait_for_turn()
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS

    def one(problem: Problem) -> Row:
        row = alone(to(problem, arguments.device), contestant, rounds, seconds / len(of_model))
        report(row)
        return row

    with triton_path(arguments.device):
        for model, problem in of_model.items():
            pieces.run(f"{name} on {model}", one, problem)
    return 1 if pieces.failed else 0


def run(arguments: argparse.Namespace) -> int:
    command = ["-m", "bench.first_hour.steps", *passed_on(arguments)]
    known = entries(arguments)
    waiting = [Entry(name, [*command, "--optimizer", name]) for name in NAMES if name in known]
    rows, failed = in_turn(waiting, seconds_left(arguments), get_ready=0.3)
    rows = with_ratios(sorted(rows, key=lambda row: row["model"]))
    write(arguments.results, "cuda_steps", rows, arguments.device)
    medians = {(row["model"], row["optimizer"]): row["median_ms"] for row in rows}
    said = [f"{model}: {key_of(medians, model)}" for model in dict.fromkeys(row["model"] for row in rows)]
    say_key("; ".join(said + ([f"FAILED: {', '.join(failed)}"] if failed else [])) or "nothing was measured")
    return 1 if failed else 0


def key_of(medians: dict[tuple[str, str], float], model: str) -> str:
    """Ours, and the original's and fused Adam's over it."""
    names = {"eager": OURS, "graph": GRAPH, "original": STRAIGHTFORWARD.name, "Adam": ADAM.name}
    found = [f"{short} {medians[model, name]:g} ms" for short, name in names.items() if (model, name) in medians]
    return ", ".join(found)


def main() -> int:
    parser = make_parser("steps", __doc__)
    parser.add_argument("--optimizer", choices=NAMES, help="this one alone, when it is told to begin (in_turn.py)")
    arguments = parser.parse_args()
    return measure(arguments.optimizer, arguments) if arguments.optimizer else run(arguments)


if __name__ == "__main__":
    sys.exit(main())
