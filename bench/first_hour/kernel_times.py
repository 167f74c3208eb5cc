"""Each launch of a steady step as torch.profiler times it, beside what bench/cuda_model.py expects of it.

python -m bench.first_hour.kernel_times [--device cpu --quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple
from unittest import mock

import torch

from soap_opt.cuda.tables import Kinds, make_tables

from .. import cuda_model
from ..cuda_steps import WARMUP, TimedStepper, to
from ..models import Problem, drawn
from ..peers import SOAP_OPTIONS
from ..results import Row, significant
from .common import Compilations, Pieces, make_parser, say_key, synchronize, triton_path, write
from .gradients import problem_of

MODELS = ("bmshj2018-hyperprior", "gpt2-block", "2000-tensors-4x4")
STEPS = 20  # two refresh periods
# Of a step in the order of time; the others are the refresh, copies and what torch launches
OURS = ("project_first_kernel", "gram_ema_kernel", "project_kernel", "project_adam_kernel", "project_apply_kernel")


class Event(NamedTuple):
    """Something that ran on the GPU."""

    name: str
    start_us: float
    us: float


def events_of(profiler: torch.profiler.profile) -> list[Event]:
    """What ran on the GPU, in the order of time. (Ranges that Python named come back as if they had run there.)"""
    found = [
        Event(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Optimizer.", "ProfilerStep"))
    ]
    return sorted(found, key=lambda event: event.start_us)


def profiled(stepper: TimedStepper, device: str, steps: int) -> list[Event]:
    """The events of so many steps of a stepper that is warm."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        for k in range(steps):
            stepper.step(k)
        synchronize(device)
    return events_of(profiler)


def by_launch(events: Sequence[Event], kernels: Sequence[str]) -> list[list[float]]:
    """For each launch of a step the times (us) of its kernel in every step.

    Args:
        events: of whole steps.
        kernels: the kernels' names in the order of a step's launches.
    """
    ours = [event for event in events if event.name in OURS]
    if len(ours) % len(kernels):
        raise ValueError(f"{len(ours)} kernels ran, which is no multiple of the {len(kernels)} of a step")
    times: list[list[float]] = [[] for _ in kernels]
    for place, event in enumerate(ours):
        expected = kernels[place % len(kernels)]
        if event.name != expected:
            raise ValueError(f"kernel {place} is {event.name}, not {expected}")
        times[place % len(kernels)].append(event.us)
    return times


def others(events: Sequence[Event], steps: int, named: Sequence[str] = OURS) -> dict[str, tuple[float, float]]:
    """(number, us) in a step of everything but the kernels ``named``, by name."""
    found: dict[str, list[float]] = {}
    for event in events:
        if event.name not in named:
            found.setdefault(event.name, []).append(event.us)
    return {name: (len(times) / steps, sum(times) / steps) for name, times in found.items()}


def kernel_of(launch: str) -> str:
    return f"{cuda_model.kernel_of(launch)}_kernel"


def stepper_of(problem: Problem, device: str) -> TimedStepper:
    """Ours, warm."""
    moved = to(problem, device)
    stepper = TimedStepper(moved.params, moved.grads, "soap_opt:SOAP", {**SOAP_OPTIONS, "fused": True})
    for k in range(WARMUP):
        stepper.step(k)
    return stepper


def launches_of(problem: Problem) -> list[Row]:
    """The launches of a step, with bench/cuda_model.py's estimate of each as ``h100_model_us``."""
    shapes = [tuple(p.shape) for p in problem.params]
    nothing = {"launch": "all", "launches": 0, "flops": 0, "bytes": 0}
    try:
        # (without the original's operations, which take ten seconds to count for 2,000 tensors)
        with mock.patch.object(cuda_model, "original_of", lambda shapes: dict(nothing)):
            model = cuda_model.model(problem.name, shapes)
        return [row for row in model if row["implementation"] == "soap_opt" and row["launch"] != "all"]
    except Exception as error:  # an estimate that fails must not keep back what was measured
        print(f"no estimate: {type(error).__name__}: {error}")
    layouts = cuda_model.layouts_of(shapes)
    tables = make_tables(Kinds.of(layouts), [True] * len(layouts))
    return [{"launch": each.kernel, "programs": each.count, "h100_model_us": None} for each in tables.launches]


def over(measured: float | None, expected: float | None) -> float | None:
    return significant(measured / expected, 3) if measured and expected else None


def rows_of(problem: Problem, device: str, steps: int) -> list[Row]:
    """A row for each launch, for each other kernel, and for all."""
    launches = launches_of(problem)
    stepper = stepper_of(problem, device)
    events = profiled(stepper, device, steps)
    times, named = [[] for _ in launches], OURS
    try:
        times = by_launch(events, [kernel_of(row["launch"]) for row in launches]) if events else times
    except ValueError as error:
        print(f"kernels and launches do not match: {error}")
        named = ()
    rows: list[Row] = []
    for row, us in zip(launches, times):
        measured = statistics.median(us) if us else None
        rows.append({
            "model": problem.name, "launch": row["launch"], "programs": row["programs"], "per_step": 1,
            "model_us": row["h100_model_us"], "measured_us": measured and significant(measured),
            "over_model": over(measured, row["h100_model_us"]),
            "least_us": significant(min(us)) if us else None, "most_us": significant(max(us)) if us else None,
        })  # fmt: skip
    for name, (number, us) in sorted(others(events, steps, named).items(), key=lambda item: -item[1][1]):
        rows.append({
            "model": problem.name, "launch": name[:60], "programs": None, "per_step": significant(number, 3), "model_us": None,
            "measured_us": significant(us), "over_model": None, "least_us": None, "most_us": None,
        })  # fmt: skip
    expected = sum(row["h100_model_us"] or 0.0 for row in launches)
    busy = sum(event.us for event in events) / steps
    rows.append({
        "model": problem.name, "launch": "all", "programs": None, "per_step": None, "model_us": significant(expected),
        "measured_us": significant(busy) if events else None, "over_model": over(busy, expected),
        "least_us": None, "most_us": None,
    })  # fmt: skip
    return rows


def problems(arguments: argparse.Namespace) -> dict[str, Problem]:
    if arguments.quick:
        return {"tiny": drawn("tiny", [(20, 12), (6, 5, 3, 3), (7,)])}
    return {model: problem_of(model, arguments.gradients) for model in MODELS}


def main() -> int:
    parser = make_parser("kernel_times", __doc__)
    arguments = parser.parse_args()
    compilations, pieces = Compilations(), Pieces()
    rows: list[Row] = []
    with triton_path(arguments.device):
        for name, problem in problems(arguments).items():
            rows += pieces.run(name, rows_of, problem, arguments.device, 2 if arguments.quick else STEPS) or []
            write(arguments.results, "cuda_kernels", rows, arguments.device)  # what is known, whatever becomes of the next
    print(compilations)
    totals = [row for row in rows if row["launch"] == "all"]
    said = [f"{row['model']} {row['measured_us']} us, model {row['model_us']}" for row in totals]
    say_key("; ".join([*said, pieces.summary()]))
    return 1 if pieces.failed else 0


if __name__ == "__main__":
    sys.exit(main())
