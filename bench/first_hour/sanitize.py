"""compute-sanitizer on parts of the smoke: memcheck on launches, steps and refresh, racecheck on the refresh's shared memory.

    python -m bench.first_hour.sanitize [--device cpu --quick]

Side by side, since each takes many times as long as without; one that is out of time counts as a failure. What they say lies in
results/sanitize/*.log while they run. Where the tool is missing the key line says so; on a CPU the parts run as they are.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from .common import deadline, make_parser, passed_on, say_key
from .side_by_side import Part, run

PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
# tool, part of the smoke
RUNS = [("memcheck", "refresh"), ("memcheck", "stages"), ("racecheck", "refresh"), ("memcheck", "steps")]
ERRORS = 99  # the exit status that stands for what the tool found


def tool() -> str | None:
    found = shutil.which("compute-sanitizer")
    return found or next((place for place in PLACES if Path(place).exists()), None)


def part_of(sanitizer: str | None, name: str, part: str, arguments: argparse.Namespace) -> Part:
    """A part of the smoke under one of the tools, or as it is without any."""
    wrapper = [sanitizer, "--tool", name, "--error-exitcode", str(ERRORS), "--print-limit", "20"] if sanitizer else []
    command = [*wrapper, sys.executable, "-m", "bench.first_hour.smoke", *passed_on(arguments), "--part", part]
    # Without PyTorch's cache every tensor is an allocation of its own, so that reading behind its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Part(f"{name} {part}", command, arguments.results / f"{name}_{part}.log", environment)


def main() -> int:
    arguments = make_parser("sanitize", __doc__).parse_args()
    sanitizer = tool()
    if sanitizer is None and arguments.device == "cuda":
        say_key("compute-sanitizer is missing here: nothing was checked")
        return 0
    arguments.quick, arguments.results = True, arguments.results / "sanitize"
    chosen = RUNS[:1] if arguments.device == "cpu" else RUNS
    parts = [part_of(sanitizer, name, part, arguments) for name, part in chosen]
    run(parts, deadline(arguments))
    for part in parts:
        print(f"\n== {part.name}\n{part.output[-20_000:]}")
    said = [f"{part.name}: {verdict(part)}" for part in parts]
    say_key("; ".join([*said, *([] if sanitizer else ["without compute-sanitizer, which is missing here"])]))
    return 1 if any(part.code != 0 for part in parts) else 0


def verdict(part: Part) -> str:
    """What the tool said of it."""
    lines = part.output.splitlines()
    if part.stopped:
        return f"OUT OF TIME, {sum('Invalid' in line or 'hazard' in line for line in lines)} errors so far"
    return next((line.strip("= ") for line in lines if "SUMMARY" in line), f"exit {part.code}")


if __name__ == "__main__":
    sys.exit(main())
