"""Suite "memory": state, and resident memory at rest and at the worst moment, each optimizer in a process of its own."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from .contest import PERIOD
from .models import MODELS
from .peers import Contestant
from .results import Row

MEMORY_MODELS = ("bmshj2018-hyperprior", "512-table", "2000-tensors-4x4")
MIB = 2**20


def measure(models: Sequence[str], contestants: Sequence[Contestant]) -> list[Row]:
    """MiB on top of a process that holds the parameters and gradients and has imported what it needs.

    ``state``: tensors in ``optimizer.state``. ``resident``: growth that stays after init and a period of steps (state, kept
    scratch, what the allocator holds). ``init_peak``, ``step_peak``: high-water marks (VmHWM) of the first step and of a
    period of steady steps. (Linux only.)
    """
    rows: list[Row] = []
    for model in models:
        problem = MODELS[model]()
        for contestant in contestants:
            if not contestant.applies_to(problem):
                continue
            stepper = dataclasses.replace(contestant, python=contestant.python or sys.executable).stepper(problem)
            start = stepper.memory()["rss"]
            stepper.step(0)
            init = stepper.memory()
            for k in range(1, PERIOD + 2):
                stepper.step(k)
            steady = stepper.memory()
            stepper.close()
            rows.append(
                {
                    "model": problem.name,
                    "optimizer": contestant.name,
                    "parameters_mib": round(4 * problem.numel / MIB, 2),
                    "state_mib": round(steady["state_bytes"] / MIB, 2),
                    "resident_mib": round((steady["rss"] - start) / MIB, 1),
                    "init_peak_mib": round((init["peak_rss"] - start) / MIB, 1),
                    "step_peak_mib": round((steady["peak_rss"] - start) / MIB, 1),
                }
            )
    return rows
