"""``python -m bench must-reach``: what the CPU engine has to reach, read from the committed results of every kind of processor,
with pass or fail."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import processor
from .contest import WARMUP
from .models import LIC_MODELS
from .results import Row, read, read_nested, table
from .steps import file_of

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
QUIET = 0.9  # a lower ``quiet`` (see contest.py), or none, and something else may have been running
START, END = "<!-- must-reach -->\n", "<!-- /must-reach -->"

# Of the two rates that a run measures the higher, and the one that a busy second core disturbs less
SHARE = "share_of_floor_1024^3"


@dataclass(frozen=True)
class Result:
    """One file of results: its rows, the first of them of the implementation that the others were compared with."""

    rows: list[Row]
    name: str
    folder: Path

    @property
    def ours(self) -> Row:
        return self.rows[0]

    def milliseconds(self) -> dict[str, list[float]]:
        """Every single time, by optimizer."""
        return read_nested(self.name, self.folder)["milliseconds"]


@dataclass(frozen=True)
class Target:
    """One row: what, the results' files with a value for each, and what the values have to be: at least, and as a stretch."""

    what: str
    least: float
    stretch: float
    files: tuple[str, ...]
    value: Callable[[Result], float | None]
    at_most: bool = False
    # For kinds of processor of which something else is asked
    by_kind: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def bounds(self, kind: str) -> tuple[float, float]:
        return self.by_kind.get(kind, (self.least, self.stretch))

    def reached(self, value: float, bound: float) -> bool:
        return value <= bound if self.at_most else value >= bound


def share(result: Result) -> float:
    return result.ours[SHARE]


def reference_over_ours(result: Result, model: str = "") -> float | None:
    """The original where it was given, else bench/reference.py; of the model that begins so, where there are several."""
    references = [row for row in result.rows if row["kind"] == "reference" and row["model"].startswith(model)]
    return next((row["over_first"] for row in references), None)


def best_peer_over_ours(result: Result) -> float | None:
    return min((row["over_first"] for row in result.rows if row["kind"] == "peer"), default=None)


def over_peer(name: str) -> Callable[[Result], float | None]:
    """An optimizer over pytorch_optimizer's SOAP: the median of the ratios of single rounds."""

    def value(result: Result) -> float | None:
        times = result.milliseconds()
        if name not in times or PEER not in times:
            return None
        return statistics.median(a / b for a, b in list(zip(times[name], times[PEER]))[WARMUP:])

    return value


def slowest_phase(result: Result) -> float:
    return result.ours["slowest_phase_over_median"]


def slowest_phase_over(bound: str) -> Callable[[Result], float]:
    return lambda result: slowest_phase(result) / result.ours[bound]


def over_adam(result: Result) -> float:
    return 1 / next(row["over_first"] for row in result.rows if row["optimizer"] == "Adam fused")


def first_step_of(model: str) -> Callable[[Result], float | None]:
    return lambda result: reference_over_ours(result, model)


def optimizer_share(result: Result) -> float:
    return result.ours["optimizer_share"]


def slowest_of_decayed(result: Result) -> float:
    return max(row["over_live"] for row in result.rows if row["optimizer"] == "soap_opt fused")


def step_files(models: Iterable[str]) -> tuple[str, ...]:
    return tuple(file_of(model) for model in models)


MULTI_TENSOR_MODEL, PEER = "bmshj2018-hyperprior", "pytorch_optimizer SOAP"
LIC = step_files(LIC_MODELS)
PAIR = ("bmshj2018-hyperprior", "bmshj2018-factorized")
ONE_THREAD = ("bmshj2018-hyperprior", "mbt2018-mean", "512-table")
TINY, DOMINATED = step_files(["2000-tensors-4x4"]), step_files(["gpt2-block", "512-table"])
ZEN4, XEON = "zen4", "sapphire-rapids"
ASKED_OF = (XEON,)  # kinds of which something is asked, measured or not
TARGETS = (
    Target(
        "share of the 2.5 U floor",
        0.60,
        0.75,
        (*LIC, "step_512-table"),
        share,
        by_kind={ZEN4: (0.72, 0.85), XEON: (0.70, 0.80)},
    ),
    Target("share of one core's 2.5 U floor, one thread", 0.75, 0.85, tuple(file_of(model, 1) for model in ONE_THREAD), share),
    Target("original / ours, steady step", 3.3, 4, step_files(PAIR), reference_over_ours, by_kind={XEON: (4.0, 4.8)}),
    Target("best SOAP peer / ours, LIC models", 2.6, 3.3, LIC, best_peer_over_ours, by_kind={XEON: (3.2, 3.8)}),
    Target("best SOAP peer / ours, 2,000 tensors of 4 x 4", 10, 20, TINY, best_peer_over_ours),
    Target("best SOAP peer / ours, one product dominates", 1.5, 1.9, DOMINATED, best_peer_over_ours),
    Target(
        "multi-tensor, refresh together / pytorch_optimizer",
        0.60,
        0.55,
        step_files([MULTI_TENSOR_MODEL]),
        over_peer("soap_opt multi tensor, together"),
        at_most=True,
    ),
    Target(
        "multi-tensor, staggered / pytorch_optimizer, whose median has no refresh",
        0.60,
        0.55,
        step_files([MULTI_TENSOR_MODEL]),
        over_peer("soap_opt multi tensor"),
        at_most=True,
    ),
    Target(
        "bench/reference.py / pytorch_optimizer",
        1.3,
        1.0,
        step_files([MULTI_TENSOR_MODEL]),
        over_peer("bench/reference.py"),
        at_most=True,
    ),
    Target("slowest phase / median, staggered, LIC models", 1.3, 1.15, LIC, slowest_phase, at_most=True),
    *(
        Target(
            f"slowest phase over its bound, elsewhere; the largest refresh {how}",
            1.2,
            1.2,
            (*DOMINATED, "step_resnet50", *TINY),
            slowest_phase_over(bound),
            at_most=True,
        )
        for how, bound in (("measured alone", "bound_measured"), ("in counted flops", "bound_counted"))
    ),
    *(Target(f"first step, original / ours, {model}", 2, 3, ("init",), first_step_of(model)) for model in PAIR),
    Target("ours / fused Adam, 2,000 tensors of 4 x 4", 1.5, 1.2, TINY, over_adam, at_most=True),
    Target(
        "2,500 steps of zero gradients: slowest 100 / with gradients", 1.1, 1.05, ("decay",), slowest_of_decayed, at_most=True
    ),
    Target("optimizer's share of a training step, hyperprior q3", 0.05, 0.03, ("training",), optimizer_share, at_most=True),
)

EQUALITY_TEST = Path("tests/csrc/test_step_lockstep.py")
EQUALITY: Row = {"target": "equality with the specification, lockstep, 100 steps", "at least": "holds", "": "a test"}


def judged(target: Target, file: str, folder: Path) -> Row:
    """The target's value in one file, and the verdict; "not measured" where there is none."""
    data = read(file, folder)
    value = target.value(Result(data, file, folder)) if data else None
    least, stretch = target.bounds(folder.name)
    if value is None:
        verdict = "not measured"
    elif target.reached(value, stretch):
        verdict = "stretch"
    else:
        verdict = "pass" if target.reached(value, least) else "MISSED"
    if value is not None and (data[0].get("quiet") or 0) < QUIET:
        verdict += " (busy machine)"
    return {"file": file, "value": None if value is None else float(f"{value:.3g}"), "verdict": verdict}


def bounds(target: Target, kind: str) -> Row:
    sign = "<=" if target.at_most else ">="
    least, stretch = target.bounds(kind)
    return {"at least": f"{sign} {least:g}", "stretch": f"{sign} {stretch:g}"}


def rows(folder: Path) -> list[Row]:
    """One row for each target and file of one kind of processor's results."""
    result = []
    for target in TARGETS:
        for file in target.files:
            found = judged(target, file, folder)
            row = {"target": target.what, "value": found["value"], **bounds(target, folder.name), "": found["verdict"]}
            result.append({**row, "data": f"bench/results/{folder.name}/{file}.csv"})
    return [*result, {**EQUALITY, "data": str(EQUALITY_TEST)}]


def summary(folder: Path) -> list[Row]:
    """One row for each target: all its values, each a link to its data from docs/."""
    result = []
    for target in TARGETS:
        found = [judged(target, file, folder) for file in target.files]
        values = [
            f"[{row['value']}](../bench/results/{folder.name}/{row['file']}.csv)"
            + (f" {row['file'].removeprefix('step_')}" if len(found) > 1 else "")
            for row in found
            if row["value"] is not None
        ]
        verdicts = [row["verdict"] for row in found if row["value"] is not None]
        order = ("MISSED", "pass", "stretch")
        worst = min(verdicts, key=lambda text: next(i for i, start in enumerate(order) if text.startswith(start)), default="")
        missing = len(found) - len(verdicts)
        verdict = worst or "not measured"
        if worst and missing:
            verdict += f", {missing} not measured"
        command = f"`python -m bench {target.files[0].partition('_')[0]}`"
        row = {
            "target": target.what,
            **bounds(target, folder.name),
            "measured": ", ".join(values),
            "": verdict,
            "command": command,
        }
        result.append(row)
    test = {"measured": f"[{EQUALITY_TEST.name}](../{EQUALITY_TEST})", "command": f"`pytest {EQUALITY_TEST}`"}
    return [*result, {**EQUALITY, **test}]


def every(tables: Callable[[Path], list[Row]]) -> str:
    """A table for each kind of processor that something was measured on, and one of what is asked of kinds that nothing was."""
    measured = processor.measured()
    parts = [f"**{processor.name_of(folder.name)}**\n\n{table(tables(folder))}" for folder in measured]
    for kind in ASKED_OF:
        if all(folder.name != kind for folder in measured):
            asked = [{"target": t.what, **bounds(t, kind)} for t in TARGETS if kind in t.by_kind]
            parts.append(f"**{processor.name_of(kind)}**: not measured. Asked there, where it differs:\n\n{table(asked)}")
    return "\n\n".join(parts)


def write_into_page() -> str:
    """Put the tables of :func:`summary` between the markers of docs/benchmarks.md; returns those of :func:`rows`."""
    before, rest = PAGE.read_text().split(START)
    PAGE.write_text(f"{before}{START}{every(summary)}\n{END}{rest.split(END)[1]}")
    return every(rows)
