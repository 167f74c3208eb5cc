"""Small result files, written whole: at no time is there half of one under its name."""

import json
import math
import os
from pathlib import Path


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
