"""Processes side by side that are stopped at one deadline, all together; what each says lies in a file of its own at once.

(Those of in_turn.py, which are to measure, have the GPU to themselves one after the other.)
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE = 2.0  # seconds for all that were killed to be gone: one that hangs in the GPU's driver may not go at all


@dataclass
class Part:
    """A process under its name, whose output goes to ``log`` (a file: a pipe stays open as long as any grandchild lives)."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    directory: Path | None = None  # where it starts
    process: subprocess.Popen | None = None
    stopped: bool = False

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                cwd=self.directory, env={**self.environment, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip

    @property
    def code(self) -> int | None:
        """Its exit status; None as long as it runs."""
        return None if self.process is None else self.process.poll()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self) -> None:
        """It and all that it started: compute-sanitizer's end is not that of the Python under it."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def still_running(parts: Sequence[Part]) -> list[Part]:
    return [part for part in parts if part.process is not None and part.code is None]


def wait_for(parts: Sequence[Part], deadline: float) -> None:
    """Until all have ended, or until then (on time.monotonic()'s clock)."""
    while still_running(parts) and time.monotonic() < deadline:
        time.sleep(0.05)


def kill(parts: Sequence[Part]) -> None:
    """All at once, then wait for all."""
    for part in still_running(parts):
        part.stopped = True
        part.kill()
    wait_for(parts, time.monotonic() + PATIENCE)


@contextlib.contextmanager
def none_left_behind(parts: Sequence[Part]) -> Iterator[None]:
    """Kill what still runs at the end, also at that by `timeout`, whose signal reaches no process of another session."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped from outside"))
    try:
        yield
    finally:
        for part in parts:
            part.kill()
        signal.signal(signal.SIGTERM, before)


def run(parts: Sequence[Part], deadline: float) -> None:
    """Start them all; none runs after the deadline."""
    with none_left_behind(parts):
        for part in parts:
            part.start()
        wait_for(parts, deadline)
        kill(parts)
