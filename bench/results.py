"""Results as data: rows with the environment and the command that made them, in bench/results/."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def environment(**extra: str) -> dict[str, str]:
    """Device, versions, threads and date: what a figure means nothing without. ``extra`` adds or replaces entries."""
    try:
        from cpuinfo import get_cpu_info

        device = get_cpu_info().get("brand_raw", platform.machine())
    except ImportError:
        device = platform.machine()
    found = {"device": device, "threads": str(torch.get_num_threads()), "python": platform.python_version()}
    for package in ("soap_opt", "torch", "triton", "pytorch_optimizer", "compressai"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return {**found, **extra, "date": datetime.date.today().isoformat(), "command": command()}


def command() -> str:
    """The command line, with what lies outside of the working directory as path/to/NAME."""
    program = Path(sys.argv[0])
    head = program.name
    if program.is_relative_to(ROOT):
        module = program.relative_to(ROOT).with_suffix("").parts
        head = " ".join(["python -m", ".".join(module[:-1] if module[-1] == "__main__" else module)])
    arguments = [re.sub(r"(^|=)/\S*?([^/\s]+)$", r"\1path/to/\2", argument) for argument in sys.argv[1:]]
    return " ".join([head, *arguments])


def table(rows: Sequence[Row], columns: Iterable[str] | None = None) -> str:
    """Rows as a Markdown table; numbers to the right."""
    columns = list(columns or rows[0])
    cells = [["" if row.get(column) is None else str(row[column]) for column in columns] for row in rows]
    numeric = [all(isinstance(row.get(column), (int, float, type(None))) for row in rows) for column in columns]
    lines = [columns, ["---:" if right else "---" for right in numeric], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def save(name: str, rows: Sequence[Row], nested: Any = None, directory: Path = RESULTS, **extra: str) -> Path:
    """Write NAME.csv, and what does not fit a table to NAME.json, to bench/results or another folder; ``extra`` goes to the
    environment."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.csv"
    about = environment(**extra)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
    if nested is not None:
        path.with_suffix(".json").write_text(json.dumps({"environment": about, **nested}) + "\n")
    return path


def read(name: str, directory: Path = RESULTS) -> list[Row]:
    """The rows of a folder's NAME.csv, numbers as numbers, empty cells as None; [] when it has not been measured."""
    path = directory / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{column: _number(cell) for column, cell in row.items()} for row in csv.DictReader(file)]


def read_nested(name: str, directory: Path = RESULTS) -> dict[str, Any]:
    """What stands in a folder's NAME.json: single times and rates."""
    return json.loads((directory / f"{name}.json").read_text())


def _number(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell or None


def significant(value: float, digits: int = 4) -> float:
    """Rounded to significant digits: a table of milliseconds and of microseconds alike."""
    return float(f"{value:.{digits}g}")
