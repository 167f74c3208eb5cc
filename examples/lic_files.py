"""Small result files, written whole: at no time is there half of one under its name. And the error of all inputs."""

import csv
import json
import math
import os
from pathlib import Path


class InputError(Exception):
    """Something that the user gave cannot be used; the message is the one line to show."""


def write_text(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def plain(value: object) -> object:
    """JSON has no NaN and no infinity: None."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def read_table(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except OSError:
        return []


def shortened(value: object) -> object:
    """Six digits of a float: the tables are committed."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return value if value.lstrip("-").isdigit() else f"{number:.6g}"
    return f"{value:.6g}" if isinstance(value, float) else value


def write_table(path: Path, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({key: shortened(value) for key, value in row.items()} for row in rows)
    os.replace(unfinished, path)
