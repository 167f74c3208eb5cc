"""Steps on a GPU, side by side: soap_opt in each of its ways, also replayed from a CUDA graph, the original, peers, Adam.

    python -m bench.cuda_steps [--model bmshj2018-hyperprior] [--reference path/to/soap.py:SOAP] [-o FILE.csv]

**It has not been run on a GPU yet.** Everybody steps in turn on the same gradients. ``median_ms`` is until the device is done,
with refreshes, also those that training would hide behind its next forward pass; ``host_ms`` is until ``step()`` returns.
``--device cpu`` shows that the script works, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import torch

from .contest import PERIOD, phase_medians
from .models import MODELS, Problem
from .peers import INSTALLED, SOAP_OPTIONS, STRAIGHTFORWARD, Contestant, parse_reference
from .results import Row, save, significant, table
from .worker import Stepper

WARMUP = 13  # init, compilation, and every unit's first refresh
DEFAULT_MODELS = ("bmshj2018-hyperprior", "bmshj2018-factorized", "gpt2-block", "2000-tensors-4x4")

GRAPH = "soap_opt fused, CUDA graph"
OURS = {
    "soap_opt fused": {"fused": True},
    "soap_opt fused, together": {"fused": True, "refresh": "together"},
    "soap_opt fused, TF32 projections": {"fused": True, "precision": "high"},
    GRAPH: {"fused": True, "capturable": True},
    "soap_opt multi tensor": {"foreach": True},
}
ADAM = Contestant("Adam fused", "other", "torch.optim:Adam", {"fused": True})


class TimedStepper(Stepper):
    """A stepper whose steps end when the device is done."""

    host_ms: float

    def run(self) -> None:
        self.optimizer.step()

    def step(self, k: int) -> float:
        for p, grad in zip(self.params, self.grads[k % len(self.grads)]):
            p.grad = grad
        return self.timed(self.run)

    def timed(self, function) -> float:
        synchronize(self.params[0].device)
        start = time.perf_counter()
        function()
        self.host_ms = 1e3 * (time.perf_counter() - start)
        synchronize(self.params[0].device)
        return 1e3 * (time.perf_counter() - start)


class GraphStepper(TimedStepper):
    """Replays one recorded step; gradients are copied into their places before it, outside of the time."""

    graph: torch.cuda.CUDAGraph | None = None

    def step(self, k: int) -> float:
        for p, grad in zip(self.params, self.grads[k % len(self.grads)]):
            if p.grad is None:
                p.grad = grad.clone()
            else:
                p.grad.copy_(grad)
        if self.graph is None and k >= 3:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.optimizer.step()
        return self.timed(self.run if self.graph is None else self.graph.replay)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def contestants(device: str, given: list[Contestant]) -> list[Contestant]:
    ours = [Contestant(name, "ours", "soap_opt:SOAP", {**SOAP_OPTIONS, **options}) for name, options in OURS.items()]
    ours = [contestant for contestant in ours if device == "cuda" or contestant.name != GRAPH]
    return [*ours, STRAIGHTFORWARD, *INSTALLED, *given, ADAM]


def stepper_of(contestant: Contestant, problem: Problem) -> TimedStepper:
    kind = GraphStepper if contestant.name == GRAPH else TimedStepper
    return kind(problem.params, problem.grads, contestant.target, contestant.options)


def row_of(problem: Problem, contestant: Contestant, times: list[float], host: list[float]) -> Row:
    """What the times (ms) of a contestant's steps come to; those before WARMUP count as ``first_ms`` alone.

    (Of fewer steps, as of a slow one that was alone, the second half counts.)
    """
    warm = WARMUP if len(times) > WARMUP else len(times) // 2
    steady = times[warm:]
    phases = phase_medians(steady)
    median = statistics.median(steady)
    return {
        "model": problem.name, "parameters": problem.numel, "optimizer": contestant.name, "kind": contestant.kind,
        "median_ms": significant(median), "mean_ms": significant(statistics.mean(steady)),
        "slowest_ms": significant(max(steady)), "host_ms": significant(statistics.median(host[warm:])),
        "first_ms": significant(times[0]), "over_first": None,
        "slowest_phase_over_median": significant(max(phases) / median, 3) if phases else None, "steps": len(steady),
    }  # fmt: skip


def contest(problem: Problem, everybody: list[Contestant], rounds: int) -> list[Row]:
    """One row for each contestant; ``over_first`` is its median over that of the first."""
    steppers = {contestant.name: stepper_of(contestant, problem) for contestant in everybody}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    host: dict[str, list[float]] = {name: [] for name in steppers}
    for k in range(WARMUP + rounds):
        names = list(steppers)
        for name in names[k % len(names) :] + names[: k % len(names)]:
            times[name].append(steppers[name].step(k))
            host[name].append(steppers[name].host_ms)
    return with_ratios([row_of(problem, each, times[each.name], host[each.name]) for each in everybody])


def alone(problem: Problem, contestant: Contestant, rounds: int, seconds: float) -> Row:
    """A contestant that nobody takes turns with: as many rounds as ``seconds`` allow, at least four steps."""
    stepper, times, host = stepper_of(contestant, problem), [], []
    end = time.perf_counter() + seconds
    for k in range(WARMUP + rounds):
        times.append(stepper.step(k))
        host.append(stepper.host_ms)
        if k >= 3 and time.perf_counter() > end:
            break
    return row_of(problem, contestant, times, host)


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows with ``over_first``: each median over that of the model's first row."""
    first: dict[str, float] = {}
    for row in rows:
        base = first.setdefault(row["model"], row["median_ms"])
        row["over_first"] = significant(row["median_ms"] / base, 3)
    return rows


def to(problem: Problem, device: str) -> Problem:
    grads = [[grad.to(device) for grad in batch] for batch in problem.grads]
    return dataclasses.replace(problem, params=[p.detach().to(device) for p in problem.params], grads=grads)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_steps", description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", choices=list(MODELS), help=f"repeatable; default: {DEFAULT_MODELS}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--reference", type=parse_reference, metavar="FILE.py:CLASS", help="the original SOAP's own file")
    parser.add_argument("--rounds", type=int, default=6 * PERIOD)
    parser.add_argument("-o", "--output", metavar="NAME", help="write bench/results/NAME.csv")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu shows that the script works")
    everybody = contestants(arguments.device, [arguments.reference] if arguments.reference else [])
    rows = []
    for model in arguments.model or DEFAULT_MODELS:
        rows += contest(to(MODELS[model](), arguments.device), everybody, arguments.rounds)
        print(table([row for row in rows if row["model"] == rows[-1]["model"]]), flush=True)
    if arguments.output:
        name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
        print(save(arguments.output, rows, device=name).name)


if __name__ == "__main__":
    main()
