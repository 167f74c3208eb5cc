"""What the stages share: their command line, the Triton path without a GPU, what is said of each piece."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..fake_driver import fake_driver, kernels, triton_path_on_cpu
from ..results import Row, save, table

Result = TypeVar("Result")
KEY = "key: "  # the line of a log that first_hour.sh puts into the summary
UNTIL = "FIRST_HOUR_UNTIL"  # in the environment: when the stage is to end by itself, in seconds since 1970


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """With the arguments that every stage has."""
    first = (description or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m bench.first_hour.{module}", description=first)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: what a machine without a GPU can do")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few cases: does it work?")
    parser.add_argument("--all", action="store_true", help="with --quick: all cases, so that Triton's cache holds every kernel")
    parser.add_argument("--results", type=Path, default=Path("first-hour"), metavar="FOLDER", help="for CSV files")
    parser.add_argument(
        "--gradients", type=Path, default=Path(".first_hour/gradients"), metavar="FOLDER", help="recorded ones (gradients.py)"
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help=f"what ends by itself ends by then, or at {UNTIL} (default: %(default)s)"
    )
    return parser


def seconds_left(arguments: argparse.Namespace) -> float:
    """Until the stage is to end by itself.

    first_hour.sh says when that is by the clock: it counts from the start of the process, of which importing torch has taken
    seconds by now.
    """
    until = os.environ.get(UNTIL)
    return float(until) - time.time() if until else arguments.seconds


def deadline(arguments: argparse.Namespace) -> float:
    """When that is, on time.monotonic()'s clock."""
    return time.monotonic() + seconds_left(arguments)


def passed_on(arguments: argparse.Namespace) -> list[str]:
    """The arguments of :func:`make_parser` for a process that does a part of the stage."""
    named = [f"--{name}={getattr(arguments, name)}" for name in ("device", "results", "gradients")]
    return named + [f"--{name}" for name in ("quick", "all") if getattr(arguments, name)]


LAUNCHED = "project_first gram_ema project project_adam project_apply reexpress due".split()


def same_hashes() -> None:
    """Hash the kernels in the order in which a step of convolutions launches them.

    In Triton 3.6 a kernel's hash depends on which ones were hashed before it in the process: the constants that its helpers
    name are added to it only when another kernel has asked for theirs already. Without this a model of matrices alone, which
    has one launch less, would compile everything anew.
    """
    for name in LAUNCHED:
        kernels()[f"{name}_kernel"].cache_key  # noqa: B018  (computed and kept)


@contextlib.contextmanager
def triton_path(device: str) -> Iterator[None]:
    """Inside, ``fused=True`` launches Triton's kernels, or what stands for that on a CPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        same_hashes()
    if device == "cuda":
        yield
        return
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    with triton_path_on_cpu() if interpreted else fake_driver():
        yield


def synchronize(device: str) -> None:
    """Errors of launches come out here."""
    if device == "cuda":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


class Pieces:
    """Runs what a stage consists of, one piece after the other, and goes on after one that fails."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.count = 0

    def run(self, name: str, function: Callable[..., Result], *arguments: Any) -> Result | None:
        self.count += 1
        start = time.perf_counter()
        try:
            result = function(*arguments)
            print(f"{name}: {result}")  # (at once: whoever is stopped later has said so much)
            return result
        except Exception as error:  # (an error of the device is for ever, but its message differs from piece to piece)
            self.failed.append(name)
            traceback.print_exc()
            print(f"FAILED {name}: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}", flush=True)
            return None
        finally:
            print(f"({name}: {time.perf_counter() - start:.1f} s)", flush=True)

    def summary(self) -> str:
        said = f"{self.count - len(self.failed)} of {self.count} pieces ran"
        return said + (f", FAILED: {', '.join(self.failed)}" if self.failed else "")


class Compilations:
    """How many kernels this process found in Triton's cache, and how many it compiled."""

    def __init__(self) -> None:
        from triton import knobs

        self.hits = self.misses = 0
        self.names: list[str] = []
        knobs.compilation.listener = self._listen

    def _listen(self, *, src: Any, cache_hit: bool, **_: Any) -> None:
        if cache_hit:
            self.hits += 1
        else:
            self.misses += 1
            self.names.append(src.name)

    def __str__(self) -> str:
        compiled = f" ({' '.join(self.names)})" if self.names else ""
        return f"Triton's cache: {self.hits} hits, {self.misses} misses{compiled}"


def write(results: Path, name: str, rows: list[Row], device: str) -> None:
    """Print the rows and keep them as results/NAME.csv."""
    if rows:
        print(table(rows, list(dict.fromkeys(column for row in rows for column in row))), flush=True)
        save(name, rows, directory=results, device=device_name(device))


def say_key(text: str) -> None:
    print(f"{KEY}{text}", flush=True)
