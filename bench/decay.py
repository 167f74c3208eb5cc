"""Suite "decay": steps whose gradients have become 0. What decays by a factor a step reaches the subnormal numbers after some
1,700 of them, where a CPU takes ten times as long for a product, and where rounding would hold it for ever."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from .contest import GemmRate, quiet
from .models import Problem, drawn
from .peers import Contestant
from .results import Row, significant

LIVE = 50  # steps with gradients
STEPS = 2500
WINDOW = 100  # steps of one median
PROBLEMS = {
    "128 x 128": [(128, 128)],
    "200 x 200": [(200, 200)],
    "convolution, dead in part": [(64, 48, 5, 5)],
}


def measure(contestants: Sequence[Contestant], quick: bool = False) -> list[Row]:
    """Every optimizer twice, in turn: with gradients throughout, and with zeros after LIVE steps ("dead in part": in half of
    the rows). over_live: the second over the first, the largest of the ratios of medians of WINDOW steps."""
    rows: list[Row] = []
    steps = 300 if quick else STEPS
    gemm = GemmRate()
    for name, shapes in PROBLEMS.items():
        live = drawn(name, shapes, batches=4)
        dead = torch.zeros(1) if "part" not in name else (torch.arange(shapes[0][0]) % 2 == 0).float().view(-1, 1, 1, 1)
        zeros = [grad * dead for grad in live.grads[0]]
        fading = Problem(name, live.params, [live.grads[k % 4] if k < LIVE else zeros for k in range(steps)])
        for contestant in contestants:
            pair = [contestant.stepper(problem) for problem in (live, fading)]
            times, rates = [], []
            for k in range(steps):
                if k % WINDOW == 0:
                    rates.append(gemm.measure())
                times.append([stepper.step(k) for stepper in pair])
            medians = [
                [statistics.median(column) for column in zip(*times[first : first + WINDOW])]
                for first in range(LIVE, steps - WINDOW + 1, WINDOW)
            ]
            rows.append(
                {
                    "model": name,
                    "optimizer": contestant.name,
                    "kind": contestant.kind,
                    "live_ms": significant(statistics.median(live_ms for live_ms, _ in medians)),
                    "first_window_ms": significant(medians[0][1]),
                    "last_window_ms": significant(medians[-1][1]),
                    "over_live": significant(max(b / a for a, b in medians), 3),
                    "steps": steps,
                    "quiet": quiet(rates),
                }
            )
    return rows
