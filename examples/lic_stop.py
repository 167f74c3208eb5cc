"""How a training run ends early: asked to by a signal, or because it cannot go on."""

import signal
import time

ECHO = 2.0
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class TrainingFailed(Exception):
    """Training cannot go on: a loss or weights that are not finite, a loss that has run away, a result that cannot be kept.

    The message is what happened; where the last good checkpoint is, and how to go on from it, is for the caller to add.
    """


class CannotSave(TrainingFailed):
    """What was trained is fine, but the checkpoint at the end cannot be written."""


class StopRequest:
    """Within it SIGINT, SIGTERM and SIGHUP only set `signal`, which the loop reads between steps; a later SIGINT acts at once.

    What comes within ECHO seconds is taken for the same request: a scheduler, a terminal and timeout(1) signal the whole
    process group, and torchrun, which is part of it, hands the signal on to its processes.

    What the process ignores stays ignored: SIGHUP under nohup.
    """

    def __init__(self):
        self.signal: int = 0
        self._since = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, _frame) -> None:
        if not self.signal:
            self.signal, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > ECHO:
            raise KeyboardInterrupt


class StopAtOnce(StopRequest):
    """Within it every one of these signals raises KeyboardInterrupt: one way out for all. `signal` says which it was."""

    def _note(self, number: int, _frame) -> None:
        self.signal = number
        raise KeyboardInterrupt


def ignore_signals(_worker: int) -> None:
    """In a loader's worker: a signal to the whole process group is the main process's to answer, which needs its batches until
    it has saved. Workers end when it closes them, or is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
