"""Gradients of real backward passes in a file, so that a machine without CompressAI can step on them.

    python -m bench.first_hour.gradients FOLDER         (bench/first_hour_prepare.sh does)

In float16, each tensor divided by its root mean square, which stands beside it: they are as small as 1e-9. What does not fit
(ELIC's 34 million numbers take 68 MB a batch) is kept as shapes and root mean squares, and drawn from them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import MODELS, Problem, drawn

RECORDED = {"bmshj2018-hyperprior": 2, "elic2022-official": 0}  # batches
DRAWN_BATCHES = 2


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def record(model: str, batches: int, folder: Path) -> Path:
    problem = MODELS[model]()
    first = problem.grads[0]
    kept: dict[str, Any] = {
        "name": problem.name,
        "shapes": [tuple(p.shape) for p in problem.params],
        "param_rms": [rms(p) for p in problem.params],
        "grad_rms": [[rms(grad) for grad in batch] for batch in (problem.grads[:batches] or [first])],
        "grads": [[(g / max(rms(g), 1e-30)).half() for g in batch] for batch in problem.grads[:batches]],
    }
    path = folder / f"{model}.pt"
    torch.save(kept, path)
    return path


def recorded(path: Path) -> Problem:
    """The problem of a file: parameters drawn, gradients as they were, or drawn with the sizes that they had."""
    kept = torch.load(path)
    like = drawn(kept["name"], kept["shapes"], batches=0 if kept["grads"] else DRAWN_BATCHES)  # parameters 0.1, gradients 0.01
    params = [10.0 * size * p for size, p in zip(kept["param_rms"], like.params)]
    if kept["grads"]:
        grads = [[scale * g.float() for scale, g in zip(*both)] for both in zip(kept["grad_rms"], kept["grads"])]
        return Problem(f"{kept['name']}, recorded", params, grads)
    sizes = kept["grad_rms"][0]
    grads = [[100.0 * scale * g for scale, g in zip(sizes, batch)] for batch in like.grads]
    return Problem(f"{kept['name']}, drawn", params, grads)


def problem_of(model: str, folder: Path) -> Problem:
    """From the file where there is one, else made here."""
    path = folder / f"{model}.pt"
    return recorded(path) if path.exists() else MODELS[model]()


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for model, batches in RECORDED.items():
        path = record(model, batches, folder)
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
