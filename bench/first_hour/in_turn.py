"""Processes that get ready side by side and then have the GPU to themselves, one after the other.

Starting an interpreter and compiling kernels takes longer than what is measured, and 16 cores can do that at once; measuring,
nobody else may run. A process calls :func:`wait_for_turn` when it is ready and prints what it found with :func:`report`.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # (which imports torch)
    from ..results import Row

READY, ROW = "ready", "row: "


def wait_for_turn() -> float:
    """Seconds that this process has from now on."""
    print(READY, flush=True)
    line = sys.stdin.readline()
    if not line:
        sys.exit("nobody waits for this any more")
    return float(line)


def report(row: Row) -> None:
    print(ROW + json.dumps(row), flush=True)


@dataclass
class Entry:
    """A process under its name: arguments of this Python, and what is added to the environment."""

    name: str
    arguments: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


class Process:
    """An entry, running from start() on. Its lines arrive in a queue, None at the end, so that waiting has a limit."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.rows, self.ready, self.ended = entry, [], False, False
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def start(self) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self.entry.environment}
        self.process = subprocess.Popen(
            [sys.executable, *self.entry.arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def follow(self, deadline: float, until_ready: bool = False) -> bool:
        """Take lines until the end (or until it is ready); False when that did not come in time."""
        while not (self.ended or (until_ready and self.ready)):
            try:
                line = self.lines.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                return False
            if line is None:
                self.ended = True
            elif line == READY:
                self.ready = True
            elif line.startswith(ROW):
                self.rows.append(json.loads(line.removeprefix(ROW)))
            else:
                print(f"[{self.entry.name}] {line}", flush=True)
        return self.ready or not until_ready

    def give_turn(self, seconds: float) -> None:
        try:
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended before

    def end(self) -> int:
        """Its exit status; killed where it still runs."""
        try:
            return self.process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def in_turn(entries: Sequence[Entry], seconds: float, get_ready: float = 0.6) -> tuple[list[Row], list[str]]:
    """Run them all within ``seconds``; what they reported, and a line for each that failed.

    As many get ready at a time as there are cores.

    Args:
        get_ready: the share of the time after which measuring begins, whoever is ready by then. Who is not has the rest of
            its own turn for both.
    """
    end, at_once = time.monotonic() + seconds, len(os.sched_getaffinity(0))
    begin_by = time.monotonic() + get_ready * seconds
    waiting = iter([Process(entry) for entry in entries])
    processes = list(itertools.islice(waiting, at_once))
    for process in processes:
        process.start()
    for process in processes:  # the list grows on the way: who is ready leaves its core to another
        process.follow(begin_by, until_ready=True)
        for another in itertools.islice(waiting, 1):
            another.start()
            processes.append(another)
    print(f"{sum(process.ready for process in processes)} of {len(processes)} ready", flush=True)
    rows, failed = [], []
    for place, process in enumerate(processes):
        turn = (end - time.monotonic()) / (len(processes) - place)  # what others leave is shared by those behind
        process.give_turn(max(0.5, 0.8 * turn))
        done = process.follow(time.monotonic() + turn)
        code = process.end()
        rows += process.rows
        if not done or code != 0:
            failed.append(f"{process.entry.name} ({f'exit status {code}' if done else 'out of time'})")
    return rows, failed
