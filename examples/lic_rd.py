"""Rate-distortion curves and what lies between two of them: BD-rate and BD-PSNR with bootstrap intervals, as tables.

A Bjontegaard delta (VCEG-M33) is the mean horizontal (BD-rate) or vertical (BD-PSNR) distance of two curves over what they
have in common, the rate on a logarithmic scale. The `bjontegaard` package computes it; here is what its input has to fulfil,
and how uncertain the result is.
"""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import bjontegaard
import numpy as np
from lic_evaluation import ImageSet, mean_results, ms_ssim_db

# How a curve runs between its points. "pchip" is the default: monotonic between monotonic points, so that the noise of
# training cannot make it overshoot, and what JVET's common test conditions use. "akima" (arXiv 2202.12565) follows smooth
# curves a little more closely; "cubic" is the third-order polynomial of the original, for comparison with older tables: it
# needs four points, and with more it no longer passes through them.
METHODS = ("pchip", "akima", "cubic")
METRICS = {"psnr": "psnr-rgb", "ms-ssim": "ms-ssim-rgb"}  # -> the key of a measurement
RESAMPLES = 2000
CONFIDENCE = 0.95
ENOUGH_POINTS = 4  # of a curve, as VCEG-M33 has them
ENOUGH_OVERLAP = 0.5  # of the shorter curve, below which a delta speaks of a small part of it


class NoComparison(ValueError):
    """Two curves between which there is no Bjontegaard delta; the message says why."""


@dataclass
class Point:
    """An operating point of a curve: one setting, trained from one or several seeds.

    Attributes:
        setting: what distinguishes it: the lambda, a codec's quality, or a file's name.
        runs: seed (any name) -> measurements per image ("bpp", "psnr-rgb", ..), the images in the same order everywhere.
    """

    setting: str
    runs: dict[str, list[dict[str, float]]]

    def values(self, metric: str) -> np.ndarray:
        """Rate (bpp) and distortion [S, I, 2] of the S runs and those I images that have the metric."""
        key = METRICS[metric]
        return np.array([[(r["bpp"], r[key]) for r in results if key in r] for results in self.runs.values()], dtype=float)

    def mean(self) -> dict[str, float]:
        """The mean of every measurement over images and runs."""
        return mean_results([mean_results(results) for results in self.runs.values()])


@dataclass
class Curve:
    """A rate-distortion curve.

    Attributes:
        label: its name, on the plot and in the tables.
        points: by rate, lowest first.
        codec: a conventional codec's, to compare with.
        optimizer: of its models ("soap", ..), "" where there is none or it is not known.
    """

    label: str
    points: list[Point]
    codec: bool = False
    optimizer: str = ""

    def __post_init__(self):
        self.points = sorted(self.points, key=lambda point: point.mean()["bpp"])

    def images(self, metric: str) -> int:
        """How many of the images have the metric."""
        return sum(METRICS[metric] in result for result in next(iter(self.points[0].runs.values())))

    def mean_points(self, metric: str) -> np.ndarray:
        """[P, 2]: rate in bpp and distortion in dB, means over images and runs."""
        return np.array([decibels(point.values(metric).mean(axis=(0, 1)), metric) for point in self.points])


def decibels(points: np.ndarray, metric: str) -> np.ndarray:
    """[.., 2] of (rate, mean PSNR or mean MS-SSIM) with the second in dB; MS-SSIM after the mean, as CompressAI plots it."""
    if metric == "psnr":
        return points
    with np.errstate(divide="ignore"):
        return np.stack([points[..., 0], -10 * np.log10(np.maximum(1 - points[..., 1], 0))], axis=-1)


# ---- Bjontegaard deltas ----


def ordered(points: np.ndarray, name: str, method: str) -> np.ndarray:
    """The points [P, 2] of (bpp, dB) by rate.

    Raises:
        NoComparison: they are too few, not finite, or no rising curve.
    """
    points = np.asarray(points, dtype=float)
    if method not in METHODS:
        raise ValueError(f"method {method!r}: choose from {', '.join(METHODS)}")
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"{name} has to be [P, 2], rate and distortion of P points, not {list(points.shape)}")
    needed = ENOUGH_POINTS if method == "cubic" else 2
    if len(points) < needed:
        raise NoComparison(f"{name} has {len(points)} point{'s' * (len(points) != 1)}, {method} needs {needed}")
    if not np.isfinite(points).all() or (points[:, 0] <= 0).any():
        raise NoComparison(f"{name} has a point that is not finite, or a rate of 0")
    points = points[np.argsort(points[:, 0], kind="stable")]
    falls = (np.diff(points, axis=0) <= 0).any(axis=1)
    if falls.any():
        (rate, level), (next_rate, next_level) = points[falls.argmax() :][:2]
        raise NoComparison(
            f"{name} is not monotonic: {level:.2f} dB at {rate:.3f} bpp, then {next_level:.2f} dB at {next_rate:.3f} bpp"
        )
    return points


def overlap(anchor: np.ndarray, test: np.ndarray) -> float:
    """How much of the shorter of two ranges (values [P]) is in the other: 1 when all of it is, 0 when nothing is."""
    (a, b), (c, d) = ((values.min(), values.max()) for values in (anchor, test))
    return max(0.0, float(min(b, d) - max(a, c))) / float(min(b - a, d - c))


def prepared(anchor: np.ndarray, test: np.ndarray, method: str, axis: int, names: tuple[str, str]):
    """Both curves by rate, when there is something to integrate over along `axis` (0: rate, 1: distortion)."""
    curves = [ordered(points, name, method) for points, name in zip((anchor, test), names)]
    ranges = [points[:, axis] for points in curves]
    if overlap(*ranges) == 0:
        unit, digits = ("bpp", 3) if axis == 0 else ("dB", 2)
        spans = [f"{name} {r.min():.{digits}f} to {r.max():.{digits}f} {unit}" for name, r in zip(names, ranges)]
        raise NoComparison(f"the curves have no {'rate' if axis == 0 else 'quality'} in common: {', '.join(spans)}")
    return curves


def bd_rate(
    anchor: np.ndarray, test: np.ndarray, method: str = "pchip", names: tuple[str, str] = ("the anchor", "the test curve")
) -> float:
    """How many percent more rate `test` takes for the same quality as `anchor`: below 0, it saves. Both [P, 2]: bpp, dB.

    With 2 or 3 points "pchip" and "akima" still work, between 2 along a straight line; "cubic" needs 4.

    Raises:
        NoComparison: too few points, a curve that does not rise, or no quality in common.
    """
    a, t = prepared(anchor, test, method, 1, names)
    return float(bjontegaard.bd_rate(a[:, 0], a[:, 1], t[:, 0], t[:, 1], method, require_matching_points=False, min_overlap=0))


def bd_psnr(
    anchor: np.ndarray, test: np.ndarray, method: str = "pchip", names: tuple[str, str] = ("the anchor", "the test curve")
) -> float:
    """How many dB `test` is above `anchor` at the same rate, of whatever distortion the points have. As bd_rate otherwise."""
    a, t = prepared(anchor, test, method, 0, names)
    return float(bjontegaard.bd_psnr(a[:, 0], a[:, 1], t[:, 0], t[:, 1], method, require_matching_points=False, min_overlap=0))


@dataclass
class Delta:
    """A Bjontegaard delta and how far to trust it.

    Attributes:
        value: in percent (bd_rate) or dB (bd_psnr); nan where there is none.
        low, high: the interval of `confidence`, nan where there is none.
        confidence: of the interval.
        overlap: part of the shorter curve that was compared.
        resamples: how many gave a value.
        notes: why there is no value or no interval, and what to beware of.
    """

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    confidence: float = CONFIDENCE
    overlap: float = 0.0
    resamples: int = 0
    notes: list[str] = field(default_factory=list)


def resampled_points(
    curves: Sequence[Curve], metric: str, resamples: int, rng: np.random.Generator
) -> tuple[list[np.ndarray], bool]:
    """Mean points of every curve in every resample, [resamples, P, 2] each, in dB; and whether anything varied.

    All curves get the same images in a resample. Runs are drawn with them: points that were trained with the same set of
    seeds get the same seeds, in all curves, because a seed stands for the same initial weights and batches.

    Of I images I are drawn, of S runs S - 1 (1 of 1): a bootstrap of S values has (S - 1) / S of the variance that their
    mean has, half of it for two seeds, and drawing one less makes up for that (Rao and Wu, JASA 83, 1988).
    """
    drawn: dict[tuple[str, ...], np.ndarray] = {}

    def weights(count: int, draws: int) -> np.ndarray:
        return rng.multinomial(draws, np.full(count, 1 / count), resamples) / draws

    values = [[point.values(metric) for point in curve.points] for curve in curves]
    counts = {array.shape[1] for arrays in values for array in arrays}
    if len(counts) != 1:
        raise ValueError(f"curves over different numbers of images cannot be paired: {sorted(counts)}")
    (images,) = counts
    image_weights = weights(images, images)
    means = []
    for curve, arrays in zip(curves, values):
        per_point = []
        for point, array in zip(curve.points, arrays):
            seeds = tuple(sorted(point.runs))
            if seeds not in drawn:
                drawn[seeds] = weights(len(seeds), max(1, len(seeds) - 1))
            in_order = array[[list(point.runs).index(seed) for seed in seeds]]
            per_point.append(np.einsum("bs,bi,sic->bc", drawn[seeds], image_weights, in_order, optimize=True))
        means.append(decibels(np.stack(per_point, axis=1), metric))
    return means, images > 1 or any(len(seeds) > 1 for seeds in drawn)


def bootstrap_delta(
    anchor: Curve,
    test: Curve,
    delta: Callable[..., float] = bd_rate,
    metric: str = "psnr",
    method: str = "pchip",
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Delta:
    """bd_rate or bd_psnr between the mean points of two curves, with a percentile interval of a paired bootstrap over images
    and, where there are several, seeds (resampled_points).

    Resamples in which a curve does not rise, or the curves have nothing in common, give no value; when that is more than
    1 - confidence of them there is no interval. Never raises NoComparison: `notes` has its message.
    """
    result = Delta(confidence=confidence)
    names = (anchor.label, test.label)
    if not anchor.images(metric):
        result.notes.append(f"no image is above {metric.upper()}'s smallest size")
        return result
    points = [curve.mean_points(metric) for curve in (anchor, test)]
    try:
        result.value = delta(*points, method, names)
    except NoComparison as error:
        result.notes.append(str(error))
        return result
    axis = 1 if delta is bd_rate else 0
    result.overlap = overlap(points[0][:, axis], points[1][:, axis])
    for curve in (anchor, test):
        if len(curve.points) < ENOUGH_POINTS:
            result.notes.append(f"{curve.label} has {len(curve.points)} points only, {ENOUGH_POINTS} are usual")
    if result.overlap < ENOUGH_OVERLAP:
        what = "quality" if axis else "rate"
        result.notes.append(f"the curves share only {100 * result.overlap:.0f} % of the {what} range of the shorter one")

    means, varies = resampled_points((anchor, test), metric, resamples, np.random.default_rng(seed))
    if not varies:
        result.notes.append("no interval: one image and one run")
        return result
    values = []
    for pair in zip(*means):
        try:
            values.append(delta(*pair, method, names))
        except NoComparison:
            pass
    result.resamples = len(values)
    if len(values) < confidence * resamples:
        what = "BD-rate" if axis else "BD-" + metric.upper()
        failed = resamples - len(values)
        result.notes.append(f"no interval of the {what}: {failed} of {resamples} resamples give no rising curves that overlap")
        return result
    tail = 50 * (1 - confidence)
    result.low, result.high = map(float, np.percentile(values, (tail, 100 - tail)))
    return result


@dataclass
class Comparison:
    """A curve against an anchor: metric -> BD-rate (%) and metric -> BD-PSNR or BD-MS-SSIM (dB)."""

    anchor: str
    test: str
    rate: dict[str, Delta]
    quality: dict[str, Delta]


def compare(curves: list[Curve], anchor: str, metrics: Sequence[str] = tuple(METRICS), **options) -> list[Comparison]:
    """Every model's curve against the anchor and against every codec. `options` are bootstrap_delta's."""
    anchors = [curve for curve in curves if curve.label == anchor]
    anchors += [curve for curve in curves if curve.codec and curve.label != anchor]
    return [
        Comparison(
            a.label,
            t.label,
            {metric: bootstrap_delta(a, t, bd_rate, metric, **options) for metric in metrics},
            {metric: bootstrap_delta(a, t, bd_psnr, metric, **options) for metric in metrics},
        )
        for a in anchors
        for t in curves
        if t is not a and not t.codec
    ]


# ---- tables ----


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned so that it can be read as it is."""
    columns = list(zip(header, *rows))
    widths = [max(map(len, column)) for column in columns]
    line = "| " + " | ".join("-" * (width - 1) + (":" if i else "-") for i, width in enumerate(widths)) + " |"
    body = [
        "| " + " | ".join(f"{cell:>{w}}" if i else f"{cell:<{w}}" for i, (cell, w) in enumerate(zip(row, widths))) + " |"
        for row in [header, *rows]
    ]
    return "\n".join([body[0], line, *body[1:]])


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """The mean, and with several values their standard deviation."""
    if any(value is None for value in values):
        return "-"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def points_table(curves: Sequence[Curve]) -> str:
    """Every operating point: means over the images, mean and standard deviation over the seeds."""
    header = ["curve", "setting", "runs", "bpp", "bpp estimated", "PSNR (dB)", "MS-SSIM", "MS-SSIM (dB)", "encoding (s)",
              "decoding (s)"]  # fmt: skip
    keys = {"bpp": 3, "bpp-estimated": 3, "psnr-rgb": 2, "ms-ssim-rgb": 4, "ms-ssim-db": 2, "encoding_time": 3,
            "decoding_time": 3}  # fmt: skip
    rows = []
    for curve in curves:
        for point in curve.points:
            runs = [mean_results(results) for results in point.runs.values()]
            for run in runs:
                if "ms-ssim-rgb" in run:
                    run["ms-ssim-db"] = ms_ssim_db(run["ms-ssim-rgb"])
            cells = [mean_and_spread([run.get(key) for run in runs], digits) for key, digits in keys.items()]
            rows.append([curve.label, point.setting, str(len(runs)), *cells])
    return markdown(header, rows)


def describe_delta(delta: Delta, unit: str) -> str:
    """ "-4.21 % [-5.00, -3.40]", "-" where there is none."""
    if math.isnan(delta.value):
        return "-"
    interval = "" if math.isnan(delta.low) else f" [{delta.low:+.2f}, {delta.high:+.2f}]"
    return f"{delta.value:+.2f} {unit}{interval}"


def bd_table(comparisons: Sequence[Comparison]) -> str:
    """All deltas with their intervals, and below the table what is to be said of them."""
    header, rows = ["curve against anchor"], []
    notes: dict[str, list[str]] = {}  # -> the comparisons that it is about
    metrics = list(comparisons[0].rate) if comparisons else []
    for metric in metrics:
        header += [f"BD-rate ({metric.upper()})", f"BD-{metric.upper()}"]
    for comparison in comparisons:
        name, cells = f"{comparison.test} against {comparison.anchor}", []
        for metric in metrics:
            deltas = comparison.rate[metric], comparison.quality[metric]
            cells += [describe_delta(delta, unit) for delta, unit in zip(deltas, ("%", "dB"))]
            for note in dict.fromkeys(note for delta in deltas for note in delta.notes):
                about = notes.setdefault(f"{metric.upper()}: {note}", [])
                about.append(name)
        rows.append([name, *cells])
    lines = [f"- {note} ({'; '.join(about)})" for note, about in notes.items()]
    return "\n".join([markdown(header, rows), *([""] + lines if lines else [])])


def write_per_image(path: Path, curves: list[Curve], images: ImageSet) -> None:
    columns = ["curve", "setting", "seed", "image", "bpp", "bpp_estimated", "psnr", "ms_ssim", "ms_ssim_db", "encoding_time",
               "decoding_time"]  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for curve in curves:
            for point in curve.points:
                for seed_, results in point.runs.items():
                    for name, r in zip(images.names, results):
                        row = {"curve": curve.label, "setting": point.setting, "seed": seed_, "image": name, "bpp": r["bpp"],
                               "bpp_estimated": r.get("bpp-estimated"), "psnr": r["psnr-rgb"],
                               "ms_ssim": r.get("ms-ssim-rgb"), "encoding_time": r.get("encoding_time"),
                               "decoding_time": r.get("decoding_time")}  # fmt: skip
                        if row["ms_ssim"] is not None:
                            row["ms_ssim_db"] = ms_ssim_db(row["ms_ssim"])
                        writer.writerow(row)
