"""What a run says while it trains: a progress bar or lines in a log, and metrics.csv, which grows row by row."""

import contextlib
import csv
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

LOG_SECONDS = 60.0  # between two lines of a log
COLUMNS = ["optimizer", "split", "step", "seconds", "learning_rate", "loss", "bpp", "psnr", "mse", "aux_loss",
           "bpp_estimated", "skipped_steps", "skipped_refreshes", "raw", "raw_shared", "preconditioned",
           "preconditioned_shared", "between_steps"]  # fmt: skip


def on_terminal() -> bool:
    return sys.stderr.isatty()


class Progress:
    """tqdm's bar on a terminal. In a log file, where every redrawing would stay, a line a minute."""

    def __init__(self, total: int, initial: int, label: str, quiet: bool = False):
        self._bar = tqdm(
            total=total, initial=initial, desc=label, unit="step", dynamic_ncols=True, disable=quiet or not on_terminal()
        )
        self._quiet, self._label, self._total = quiet, label, total
        self._first = self._step = initial
        self._begun = self._said = time.monotonic()
        self._last = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def update(self) -> None:
        self._step += 1
        self._bar.update()

    def show(self, text: str) -> None:
        """The latest values, beside the bar or in the next line of the log."""
        self._bar.set_postfix_str(text)
        now = time.monotonic()
        if not self._bar.disable or self._quiet or now - self._said < LOG_SECONDS:
            return
        self._said = now
        rate = (self._step - self._first) / (now - self._begun)
        left = tqdm.format_interval((self._total - self._step) / rate)
        self.write(f"{self._label} step {self._step:>5} of {self._total}: {text}; {rate:.3g} steps/s, {left} left")

    def write(self, line: str) -> None:
        """A line of its own, above the bar."""
        if not self._quiet:
            tqdm.write(line)
            sys.stdout.flush()


class Metrics:
    """metrics.csv: the rows of one or more runs' histories, appended and flushed as they come, so that a run that is killed
    leaves all of them. A full disk does not stop a run: the rows stay in the history, and are written when there is room.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._runs: list[list[dict]] = []
        self._written = 0  # rows of the last history that are in the file
        self.complaint: str | None = None

    def begin(self, history: list[dict]) -> None:
        """From now on rows of this history, too. What the file held of a run beyond its checkpoint is dropped."""
        self._runs.append(history)
        self._rewrite()

    def flush(self) -> None:
        """Append what is new."""
        if self.path is None or not self._runs:
            return
        rows = self._runs[-1]
        if self.complaint or not self.path.exists():
            self._rewrite()
        elif self._written < len(rows):
            try:
                with self.path.open("a", newline="") as file:
                    csv.DictWriter(file, COLUMNS).writerows(rows[self._written :])
                self._written = len(rows)
            except OSError as error:
                self.complaint = f"{self.path}: {error.strerror}"

    def _rewrite(self) -> None:
        if self.path is None:
            return
        unfinished = self.path.with_name(self.path.name + ".tmp")
        try:
            with unfinished.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                for history in self._runs:
                    writer.writerows(history)
            os.replace(unfinished, self.path)
            self._written, self.complaint = len(self._runs[-1]), None
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            self.complaint = f"{self.path}: {error.strerror}"


class Stopwatch:
    """Seconds since it was made, and those that it was made with, without those inside of `stopped`."""

    def __init__(self, seconds: float):
        self._started = time.perf_counter() - seconds

    def read(self) -> float:
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._started += time.perf_counter() - before
