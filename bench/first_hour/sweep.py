"""Warps, stages, depth and how products are multiplied, on the hyperprior: a process for each setting of SOAP_OPT_KERNELS.

    python -m bench.first_hour.sweep [--device cpu --quick]

All compile and warm up side by side; then each has the GPU to itself for its steps and for torch.profiler's times of its
kernels. A setting that does not compile (too much shared memory, say) is a line among those that failed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys

from soap_opt.cuda import configs

from ..cuda_steps import TimedStepper
from ..models import Problem, drawn
from ..results import Row, significant
from .common import make_parser, passed_on, say_key, seconds_left, triton_path, write
from .gradients import problem_of
from .in_turn import Entry, in_turn, report, wait_for_turn
from .kernel_times import OURS, profiled, stepper_of

MODEL = "bmshj2018-hyperprior"
DEFAULT = ""  # as soap_opt/cuda/configs.py has it
GRID = [f"warps={warps} stages={stages} deep={deep}" for warps, deep, stages in itertools.product((4, 8), (16, 32), (2, 3, 4))]
SETTINGS = [DEFAULT, *GRID, "precision=ieee", "precision=ieee warps=4", "precision=ieee deep=32"]
QUICK_SETTINGS = [DEFAULT]
ROUNDS = 60


def problem(arguments: argparse.Namespace) -> Problem:
    return drawn("tiny", [(20, 12), (6, 5, 3, 3), (7,)]) if arguments.quick else problem_of(MODEL, arguments.gradients)


def measure(arguments: argparse.Namespace) -> int:
    """The setting that this process was started with."""
    with triton_path(arguments.device):
        stepper = stepper_of(problem(arguments), arguments.device)
        profiled(stepper, arguments.device, 1)  # the first time takes a second
        wait_for_turn()
        report(row_of(stepper, arguments.device, 3 if arguments.quick else ROUNDS))
    return 0


def row_of(stepper: TimedStepper, device: str, rounds: int) -> Row:
    times = [stepper.step(k) for k in range(rounds)]
    events = profiled(stepper, device, 10)
    kernels = {
        name.removesuffix("_kernel") + "_us": significant(sum(event.us for event in events if event.name == name) / 10)
        for name in OURS
    }
    busy = sum(event.us for event in events if event.name in OURS) / 10
    return {
        "setting": configs.OVERRIDES or "default", "model": MODEL, "median_ms": significant(statistics.median(times)),
        "kernels_us": significant(busy), **kernels,
    }  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    command = ["-m", "bench.first_hour.sweep", "--setting", *passed_on(arguments)]
    settings = SETTINGS if arguments.all or not arguments.quick else QUICK_SETTINGS
    waiting = [Entry(each or "default", command, {"SOAP_OPT_KERNELS": each}) for each in settings]
    rows, failed = in_turn(waiting, seconds_left(arguments), get_ready=0.7)
    rows.sort(key=lambda row: row["kernels_us"] or 1e3 * row["median_ms"])  # (no profiler: the step, in us too)
    write(arguments.results, "cuda_sweep", rows, arguments.device)
    for line in failed:
        print(f"FAILED {line}")
    best = [f"{row['setting']}: {row['kernels_us']:g} us of kernels, {row['median_ms']:g} ms" for row in rows[:2]]
    default = [row for row in rows if row["setting"] == "default"]
    best += [f"default {default[0]['kernels_us']:g} us"] if default else []
    say_key("; ".join([*best, *([f"{len(failed)} of {len(settings)} FAILED"] if failed else [])]))
    return 1 if failed or not rows else 0


def main() -> int:
    parser = make_parser("sweep", __doc__)
    parser.add_argument(
        "--setting", action="store_true", help="that of SOAP_OPT_KERNELS alone, when it is told to (in_turn.py)"
    )
    arguments = parser.parse_args()
    return measure(arguments) if arguments.setting else run(arguments)


if __name__ == "__main__":
    sys.exit(main())
