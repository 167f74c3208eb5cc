"""Does it run at all, and what comes out: every part in a process of its own, errors as numbers, nothing asserted.

    python -m bench.first_hour.smoke [--device cpu] [--part NAME ...]

An illegal access ends a process's use of the GPU, so that the parts do not share one; they run side by side, and what each
says lies in results/smoke/PART.log while it runs. Errors are relative to the norm unless the column says otherwise; float32
rounds at 6e-8, and what the tests allow is 5e-5 for a step and 1e-6 for a Gram. On a CPU without TRITON_INTERPRET=1 launches
are pretended: then the numbers say nothing.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

from ..results import Row
from . import refresh_checks, stage_checks, step_checks
from .common import KEY, Compilations, Pieces, deadline, make_parser, passed_on, say_key, triton_path, write
from .side_by_side import Part, run


def refresh(arguments: argparse.Namespace, pieces: Pieces) -> list[Row]:
    sizes = refresh_checks.QUICK_SIZES if arguments.quick else refresh_checks.SIZES
    return refresh_checks.check_all(arguments.device, pieces, sizes)


def stages(arguments: argparse.Namespace, pieces: Pieces) -> list[Row]:
    cases = {
        "float32": ({}, torch.float32),
        "bfloat16, normalised": ({"normalize_grads": True}, torch.bfloat16),
    }
    rows: list[Row] = []
    if arguments.quick and not arguments.all:
        del cases["bfloat16, normalised"]
    for name, (options, dtype) in cases.items():
        found = pieces.run(f"launches of {name}", stage_checks.check, arguments.device, arguments.quick, options, dtype)
        rows += [{"case": name, **row} for row in found or []]
    return rows


def steps(arguments: argparse.Namespace, pieces: Pieces) -> list[Row]:
    names = step_checks.CASES if arguments.all or not arguments.quick else list(step_checks.CASES)[:1]
    rows = [pieces.run(f"steps, {name}", step_checks.check, arguments.device, arguments.quick, name) for name in names]
    return [row for row in rows if row is not None]


def graph(arguments: argparse.Namespace, pieces: Pieces) -> list[Row]:
    if arguments.device == "cpu":
        print("a CUDA graph needs a GPU")
        return []
    row = pieces.run("replays of a graph", step_checks.check_graph, arguments.quick)
    return [] if row is None else [row]


PARTS = {"refresh": refresh, "stages": stages, "steps": steps, "graph": graph}


def run_part(name: str, arguments: argparse.Namespace) -> int:
    compilations, pieces = Compilations(), Pieces()
    with triton_path(arguments.device), torch.no_grad():
        rows = PARTS[name](arguments, pieces)
    write(arguments.results, f"smoke_{name}", rows, arguments.device)
    print(compilations)
    say_key(f"{pieces.summary()}, {compilations.hits} cache hits, {compilations.misses} misses")
    return 1 if pieces.failed else 0


def environment(part: str) -> dict[str, str]:
    """Launches that the host waits for are what a capture forbids."""
    return {name: value for name, value in os.environ.items() if part != "graph" or name != "CUDA_LAUNCH_BLOCKING"}


def run_parts(arguments: argparse.Namespace) -> int:
    """Every part in a process, all until the deadline at most; then their outputs one after the other."""
    command = [sys.executable, "-m", "bench.first_hour.smoke", *passed_on(arguments)]
    folder = arguments.results / "smoke"
    parts = [Part(name, [*command, "--part", name], folder / f"{name}.log", environment(name)) for name in arguments.parts]
    run(parts, deadline(arguments))
    for part in parts:
        print(f"\n== {part.name}: {how(part)}\n{part.output}", flush=True)
    say_key("; ".join(f"{part.name}: {verdict(part)}" for part in parts))
    return 1 if any(part.code != 0 for part in parts) else 0


def how(part: Part) -> str:
    return "OUT OF TIME" if part.stopped else f"exit status {part.code}"


def verdict(part: Part) -> str:
    """Its key line, or what it got to."""
    lines = part.output.splitlines()
    keys = [line.removeprefix(KEY) for line in lines if line.startswith(KEY)]
    return keys[-1] if keys else f"{how(part)} after {lines[-1][:150] if lines else 'nothing was said'}"


def main() -> int:
    parser = make_parser("smoke", __doc__)
    parser.add_argument(
        "--part", dest="parts", action="append", choices=list(PARTS), help="repeatable; one alone: in this process"
    )
    arguments = parser.parse_args()
    arguments.parts = arguments.parts or list(PARTS)
    if len(arguments.parts) == 1:
        return run_part(arguments.parts[0], arguments)
    return run_parts(arguments)


if __name__ == "__main__":
    sys.exit(main())
