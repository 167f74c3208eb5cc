"""Suite "training": the optimizer's share of a real training step of bmshj2018-hyperprior."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from .contest import PERIOD, WARMUP, GemmRate, quiet
from .models import LAMBDA, MODELS, crops, lic_network, main_parameters
from .peers import Contestant
from .results import Row, significant
from .worker import Stepper, load

MODEL, BATCH_SIZE, PATCH = "bmshj2018-hyperprior", 8, 128


class Training:
    """One network with its optimizer, and the auxiliary one (Adam) for its quantiles."""

    def __init__(self, contestant: Contestant) -> None:
        from compressai.losses import RateDistortionLoss

        self.net = lic_network(MODEL).train()
        self.criterion = RateDistortionLoss(lmbda=LAMBDA)
        self.params = main_parameters(self.net)
        quantiles = [p for name, p in self.net.named_parameters() if name.endswith(".quantiles")]
        self.optimizer = load(contestant.target)(self.params, **contestant.options)
        self.auxiliary = torch.optim.Adam(quantiles, lr=1e-3)

    def step(self, images: Tensor) -> tuple[float, float]:
        """Milliseconds of a training step on images [B, 3, h, w], as CompressAI's script makes it, and of optimizer.step()."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.auxiliary.zero_grad()
        self.criterion(self.net(images), images)["loss"].backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        before = time.perf_counter()
        self.optimizer.step()
        after = time.perf_counter()
        self.net.aux_loss().backward()
        self.auxiliary.step()
        return 1e3 * (time.perf_counter() - start), 1e3 * (after - before)


def measure(contestants: Sequence[Contestant], periods: int = 3) -> list[Row]:
    """Training runs in turn, step by step, on the same images; one row for each optimizer, medians over steady steps."""
    images = list(islice(crops(BATCH_SIZE, PATCH), PERIOD))
    runs = {contestant.name: Training(contestant) for contestant in contestants}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    gemm, rates = GemmRate(), []
    for k in range(WARMUP + periods * PERIOD):
        rates.append(gemm.measure())
        for name, run in runs.items():
            times[name].append(run.step(images[k % len(images)]))
    rows = []
    for name, pairs in times.items():
        steady = pairs[WARMUP:]
        rows.append(
            {
                "model": f"{MODEL} q3, batch {BATCH_SIZE} of {PATCH}x{PATCH}",
                "optimizer": name,
                "training_step_ms": significant(statistics.median(total for total, _ in steady)),
                "optimizer_ms": significant(statistics.median(part for _, part in steady)),
                "optimizer_share": significant(statistics.median(part / total for total, part in steady), 3),
                "steps": len(steady),
                "quiet": quiet(rates),
            }
        )
    return rows


PROFILED = (MODEL, "cheng2020-anchor", "elic2022-official")


def profile(model: str, contestant: Contestant, training_step_ms: float | None, periods: int = 3) -> list[Row]:
    """Where a step's time goes: what it takes without its refreshes, and without any matrix.

    Args:
        contestant: one that takes SOAP's options.
        training_step_ms: of :func:`measure`, for the share of a training step.
    """
    problem = MODELS[model]()
    variants = {
        "whole": {},
        "no refresh": {"precondition_frequency": 10**9},
        "no matrices": {"max_precond_dim": 0},
    }
    steppers = {
        name: Stepper(problem.params, problem.grads, contestant.target, {**contestant.options, **options})
        for name, options in variants.items()
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    gemm, rates = GemmRate(), []
    for k in range(WARMUP + periods * PERIOD):
        rates.append(gemm.measure())
        for name, stepper in steppers.items():
            times[name].append(stepper.step(k))
    whole, steady, elementwise = (statistics.mean(times[name][WARMUP:]) for name in variants)
    rate = statistics.median(each["1024^3"] for each in rates)
    floor = problem.floor_flops / rate / 1e6
    parts = {
        "optimizer.step(), mean over periods": whole,
        "refreshes": whole - steady,
        "projections, back-projections and Grams": steady - elementwise,
        f"of these, their 2.5 U = {problem.floor_flops / 1e9:.3g} GF at the 1024^3 rate of {rate:.0f} GF/s": floor,
        "Adam, weight decay, application, Python": elementwise,
    }
    return [
        {
            "model": problem.name,
            "part": part,
            "ms": significant(milliseconds),
            "share_of_step": significant(milliseconds / whole, 3),
            "share_of_training_step": significant(milliseconds / training_step_ms, 3) if training_step_ms else None,
            "quiet": quiet(rates),
        }
        for part, milliseconds in parts.items()
    ]
