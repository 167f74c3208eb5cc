"""A small study, and outcomes for its runs."""

import csv
from pathlib import Path

from lic_files import write_json
from lic_study import Study

PLAN = """
title: A small one
steps: 100
evaluations: 4
train: {N: 8, M: 12, batch-size: 2, warmup-steps: 5, eval-crop: [128, 192]}
optimizers:
  Adam: {optimizer: adam}
  SOAP: {optimizer: soap}
baseline: Adam
rates:
  - {fraction: 0.1, seeds: [0, 1], grid: {Adam: [1.0e-3, 2.0e-3], SOAP: [1.0e-3, 4.0e-3]}}
  - {fraction: 1.0, seeds: [0], grid: {Adam: [1.0e-3, 2.0e-3]}}
horizons: {seeds: [0, 1], fractions: [0.1, 1.0], optimizers: [Adam, SOAP]}
curves: {seeds: [0], lambdas: [0.01, 0.02], optimizers: [Adam, SOAP]}
ablations:
  - fraction: 0.1
    seeds: [0]
    optimizers: [SOAP]
    variants: [{weight-decay: 0}, {clip-max-norm: 0, optimizer-args: max_grad_norm=1.0}, {betas: [0.9, 0.95]}, {rate-factor: 3}]
measure:
  outliers: {experiments: [curves]}
  quantization: {experiments: [curves], bits: [8/8]}
"""


def make_study(tmp_path: Path, text: str = PLAN) -> Study:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return Study(path, tmp_path / "study")


def finish(study: Study, losses) -> None:
    """Write the outcome of every run that can be named by now."""
    for run in study.runs(study.results())[0]:
        folder = study.folder_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "finished.json").exists():
            write_json(folder / "finished.json", {"failed": losses(run) is None, "loss": losses(run), "bpp": 0.5, "psnr": 27.0})


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
