"""Skipped steps and refreshes: counts for each parameter, and a warning at the first one, when the step is done."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from torch import Tensor

from .batch import Skipped

if TYPE_CHECKING:
    from .cuda.follow import Following

TEXTS = (  # for skipped steps and for skipped refreshes
    "SOAP: the gradient of {} is not finite, or its squared norm overflows; the parameter and its state stay as they are. "
    "Later cases are counted by skipped_steps() without a warning.",
    "SOAP: a basis of {} could not be refreshed, because its Gram is not finite or its QR decomposition is not orthogonal; the "
    "basis and the moments stay as they are. Later cases are counted by skipped_refreshes() without a warning.",
)


class Skips:
    """Counts of skipped steps and skipped refreshes, by parameter."""

    def __init__(self) -> None:
        self.counts: tuple[dict[Tensor, int], dict[Tensor, int]] = ({}, {})  # steps, refreshes
        self._news: tuple[list[Tensor], list[Tensor]] = ([], [])

    def add(self, params: Sequence[Tensor], skipped: Skipped) -> None:
        for counts, news, places in zip(self.counts, self._news, skipped):
            for place in places:
                param = params[place]
                if param not in counts and param.device.type == "cpu":  # (the host does not wait for other devices)
                    news.append(param)
                counts[param] = counts.get(param, 0) + 1

    @contextmanager
    def warning_at_the_end(self, describe: Callable[[Tensor], str]) -> Iterator[None]:
        """Call :meth:`warn` at the end, whatever happens inside."""
        try:
            yield
        finally:
            self.warn(describe)

    def warn(self, describe: Callable[[Tensor], str]) -> None:
        """Warn of parameters skipped for the first time. A warning may be an exception: call this when the step is done."""
        if not any(self._news):
            return
        news, self._news = self._news, ([], [])
        for params, text in zip(news, TEXTS):
            if len(params) > 3:  # one warning: a step that overflowed whole would make thousands
                names = [f"{describe(params[0])} and of {len(params) - 1} more"]
            else:
                names = [describe(param) for param in params]
            for name in names:
                warnings.warn(text.format(name), stacklevel=users_stacklevel())

    def totals(self, params: Sequence[Tensor], exp_avgs: Sequence[Tensor | None], following: Following) -> Skipped:
        """The numbers of skipped steps and of skipped refreshes for each parameter, with the counts on the device. exp_avgs:
        each parameter's, or None where there is no state."""
        on_device = [following.counts(exp_avg) for exp_avg in exp_avgs]
        columns = zip(*on_device) if on_device else ((), ())
        return Skipped(
            *([counts.get(p, 0) + n for p, n in zip(params, column)] for counts, column in zip(self.counts, columns))
        )

    def set_totals(
        self, params: Sequence[Tensor], exp_avgs: Sequence[Tensor | None], following: Following, totals: Skipped
    ) -> None:
        """Make :meth:`totals` return ``totals``, whatever the device has counted for the present state."""
        for counts, column, kind in zip(self.counts, totals, range(len(totals))):
            counts.clear()
            for param, exp_avg, total in zip(params, exp_avgs, column):
                own = total - following.counts(exp_avg)[kind]
                if own != 0:
                    counts[param] = own


def users_stacklevel() -> int:
    """The first frame outside of torch and soap_opt, counted from the function that warns: torch's wrappers vary in number."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "soap_opt", "contextlib"):
        frame, level = frame.f_back, level + 1
    return level
