"""What a study says of the models that were trained: rate and distortion, outliers, and what quantisation costs."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from lic_document import Report, number, plain_numbers, spread
from lic_rd import Curve, Delta, NoComparison, Point, bootstrap_delta
from lic_rd_plot import plot_rd

LATENTS = ("y", "z")
COMPARED = ("kurtosis_channels", "kurtosis", "max_over_median")  # of OutlierMeter
SCRATCH, STARTED = ("from scratch", False), ("from a shared start", True)


def rate_distortion(report: Report) -> None:
    """Rate-distortion curves at equal steps."""
    curves = {curve.label: curve for curve in rd_curves(report, "rd")}
    curves = {label: curve for label, curve in curves.items() if len(curve.points) > 1}
    base, subject = report.study.baseline, report.study.subject
    if base not in curves:
        return
    report.section("Rate and distortion")
    if started := [run for run in report.data.of("curves") if run["start"]]:
        report.text(
            f"Every model continues another one for {started[0]['steps']:,.0f} steps, with each seed the same for all: "
            f"{report.start_of(started[0])} steps."
        )
    rows, remarks = [], {}
    for label, curve in curves.items():
        for point in curve.points:
            mean = point.mean()
            rows.append([label, point.setting, str(len(point.runs)), f"{mean['bpp']:.4f}", f"{mean['psnr-rgb']:.2f}"])
        if label == base:
            continue
        delta = bootstrap_delta(curves[base], curve)
        remarks[label] = describe(delta)
        if label == subject:
            bar = report.study.bars.get("bd-rate", -3)
            report.claim(
                f"BD-rate against {base} at equal steps",
                f"{bar:g} % or better, the interval excluding 0",
                describe(delta),
                None if math.isnan(delta.value) else delta.value <= bar and delta.high < 0,
                ["curves"],
                "rd",
            )
        for note in delta.notes:
            report.text(f"{label}: {note}.")
        if not math.isnan(delta.value):
            low, high = common_quality(curves[base], curve)
            report.text(f"{label} and {base} have {low:.2f} to {high:.2f} dB in common, over which BD-rate is taken.")
    plot_rd(report.folder / "rd.png", list(curves.values()), {label: f"BD-rate {text}" for label, text in remarks.items()})
    report.picture("rd.png", f"Rate-distortion curves over {images(report)} images, actual bitstreams; BD-rate against {base}.")
    report.table(["optimizer", "lambda", "seeds", "bpp", "PSNR (dB)"], rows)


def common_quality(*curves: Curve) -> tuple[float, float]:
    """The lowest and the highest PSNR, in dB, that all curves reach."""
    reached = [[point.mean()["psnr-rgb"] for point in curve.points] for curve in curves]
    return max(map(min, reached)), min(map(max, reached))


def images(report: Report) -> int:
    return len({row["image"] for rows in report.data.rows("rd").values() for row in rows})


def describe(delta: Delta) -> str:
    if math.isnan(delta.value):
        return "no value"
    interval = f" [{delta.low:+.1f}, {delta.high:+.1f}]" if not math.isnan(delta.low) else ""
    return f"{delta.value:+.1f} %{interval}"


def rd_curves(report: Report, table: str, keep: Callable[[dict], bool] = lambda row: True) -> list[Curve]:
    """One curve for each optimizer over the lambdas of the experiment "curves"."""
    measured = report.data.rows(table)
    points: dict[str, dict[float, dict[str, list[dict]]]] = defaultdict(lambda: defaultdict(dict))
    for run in report.data.of("curves"):
        rows = [
            {key: number(value) for key, value in row.items() if key in ("bpp", "psnr-rgb", "ms-ssim-rgb") and value != ""}
            for row in measured.get(run["run"], [])
            if keep(row)
        ]
        if rows:
            points[run["optimizer"]][run["lambda"]][run["seed"]] = rows
    return [
        Curve(
            label,
            [Point(f"{lmbda:g}", runs) for lmbda, runs in by_lambda.items()],
            optimizer=report.study.optimizers[label].get("optimizer", "soap"),
        )
        for label, by_lambda in points.items()
    ]


def outliers(report: Report) -> None:
    """Of models that differ in the optimizer alone: those trained from scratch, which the claim rests on, and beside them those
    that went on from one model, whose outliers come from there too."""
    groups = {text: found for text, started in (SCRATCH, STARTED) if (found := LikeRuns(report, started)).count}
    if not groups:
        return
    base, subject = report.study.baseline, report.study.subject
    report.section("Outliers")
    for text, group in groups.items():
        alike = "alike in model, length, lambda and seed"
        report.text(f"{text[0].upper()}{text[1:]}: means over {group.count} runs of each optimizer, {alike}.")
        if group.left_out:
            report.text(f"Not measured on all of these runs, and left out: {', '.join(group.left_out)}.")
    text, group = next(iter(groups.items()))
    plot_outliers(report, group, text)
    rows = []
    for what, of in groups.items():
        for label, layer in ((label, layer) for label in of.mean for layer in LATENTS if layer in of.mean[label]):
            values = of.mean[label][layer]
            rows.append(
                [what, label, layer, f"{values['kurtosis_channels']:.2f}", f"{values['kurtosis']:.2f}"]
                + [f"{values['max_over_median']:.1f}", f"{100 * values['beyond_6_sigma']:.3f} %"]
            )  # fmt: skip
    header = ["kurtosis (channels)", "kurtosis (values)", "max / median", "beyond 6 sigma"]
    report.table(["models", "optimizer", "latent", *header], rows)
    layers = group.layers
    lower = {k: sum(group.mean[subject][layer][k] < group.mean[base][layer][k] for layer in layers) for k in COMPARED}
    fine = all(
        group.mean[subject][layer][k] < group.mean[base][layer][k] for layer in LATENTS if layer in layers for k in COMPARED
    )
    report.claim(
        "outliers",
        f"lower than {base}'s in the latents and most layers",
        f"lower in {lower['kurtosis_channels']} (kurtosis of channels), {lower['kurtosis']} (of values) and "
        f"{lower['max_over_median']} (max / median) of {len(layers)} layers and latents; latents "
        + ("lower in all three" if fine else "not lower in all three"),
        fine and all(count > len(layers) / 2 for count in lower.values()),
        group.experiments,
        "outliers",
    )


class LikeRuns:
    """The runs with measured outliers that are alike but for the optimizer: outliers grow with lambda and length, so that
    others cannot stand beside each other.

    Attributes:
        count: of the runs of each optimizer.
        mean: optimizer -> layer -> measure, over these runs.
        layers: of both the baseline and the subject; those that repeat a latent are left out.
        left_out: optimizers that were not measured on all of them.
        experiments: of which they are.
    """

    def __init__(self, report: Report, started: bool):
        measured = report.data.rows("outliers")
        base, subject = report.study.baseline, report.study.subject
        settings: dict[str, dict[tuple, str]] = defaultdict(dict)
        for run in (report.data.runs[name] for name in measured):
            if bool(run["start"]) == started:
                setting = tuple(run[key] for key in ("model", "variant", "steps", "lambda", "seed", "start"))
                settings[run["optimizer"]][setting] = run["run"]
        common = settings[base].keys() & settings[subject].keys()
        self.count = len(common)
        by: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        for label in (label for label in report.study.optimizers if common and common <= settings[label].keys()):
            for row in (row for setting in common for row in measured[settings[label][setting]]):
                for key in (*COMPARED, "beyond_6_sigma"):
                    by[label][row["layer"]][key].append(number(row[key]))
        self.left_out = [label for label in report.study.optimizers if settings[label] and label not in by]
        self.layers = [layer for layer in by[base] if layer in by[subject]] if common else []
        self.mean = {
            label: {
                layer: {key: float(np.nanmean(v)) if not np.all(np.isnan(v)) else math.nan for key, v in of.items()}
                for layer, of in by[label].items()
            }
            for label in by
        }
        # The module that ends a transform gives out a latent, which is counted once, by the latent's name.
        self.layers = [
            layer
            for layer in self.layers
            if layer in LATENTS or all(self.mean[base][layer] != self.mean[base].get(latent) for latent in LATENTS)
        ]
        of_common = [report.data.runs[settings[base][setting]]["experiments"] for setting in common]
        self.experiments = [name for name in ("horizons", "curves") if any(name in names for names in of_common)]


def plot_outliers(report: Report, group: LikeRuns, text: str) -> None:
    figure, axes = report.axes(2, width=7.5, height=5.0)
    count = len(group.mean)
    for axis, key, what in zip(axes, ("kurtosis_channels", "kurtosis"), ("of the channels' RMS", "of the values")):
        places = np.arange(len(group.layers))
        for k, (label, values) in enumerate(group.mean.items()):
            lengths = [values[layer][key] for layer in group.layers]
            axis.barh(places + 0.8 * k / count, lengths, 0.8 / count, color=report.colours[label], label=label)
        axis.set_yticks(places + 0.4 - 0.4 / count, group.layers, size=8)
        axis.invert_yaxis()
        axis.set(xscale="log", title=f"kurtosis {what}")
        axis.set_xlim(left=1)  # its least: bars that began elsewhere would lie about their ratio
        plain_numbers(axis.xaxis)
    caption = f"Kurtosis of every layer's output and of the latents, models trained {text}, means over {group.count} runs."
    report.save(figure, "outliers.png", caption)


def quantization(report: Report) -> None:
    measured = report.data.rows("quantization")
    settings = list(dict.fromkeys(row["setting"] for rows in measured.values() for row in rows if row["setting"] != "float"))
    if settings:
        report.section("Quantisation after training")
        costs = {"BD-rate loss (%)": quantized_curves(report, settings)} | quantized_models(report, settings)
        plot_quantization(report, settings, {title: cost for title, cost in costs.items() if cost})


Costs = dict[str, dict[str, float]]  # by setting and optimizer, in percent


def quantized_curves(report: Report, settings: list[str]) -> Costs:
    """BD-rate of each optimizer's quantised models against the same models in float."""
    base, subject = report.study.baseline, report.study.subject
    whole = {curve.label: curve for curve in rd_curves(report, "quantization", lambda row: row["setting"] == "float")}
    losses: Costs = defaultdict(dict)
    rows = []
    for setting in settings:
        for curve in rd_curves(report, "quantization", lambda row, setting=setting: row["setting"] == setting):
            label = curve.label
            try:
                delta = bootstrap_delta(replace(whole[label], label="float"), replace(curve, label=setting))
                value, text = delta.value, describe(delta)
                if math.isnan(value):
                    text = f"- ({'; '.join(delta.notes)})"
            except NoComparison as error:
                value, text = math.nan, f"- ({error})"
            losses[setting][label] = value
            before = {point.setting: point.mean() for point in whole[label].points}
            bpp = np.mean([p.mean()["bpp"] / before[p.setting]["bpp"] - 1 for p in curve.points])
            psnr = np.mean([p.mean()["psnr-rgb"] - before[p.setting]["psnr-rgb"] for p in curve.points])
            rows.append([setting, label, text, f"{100 * bpp:+.1f} %", f"{psnr:+.2f}"])
    report.table(["weights/activations, rounding, ranges", "optimizer", "BD-rate loss [95 %]", "bpp", "PSNR (dB)"], rows)
    pairs = [(s, losses[s].get(subject, math.nan), losses[s].get(base, math.nan)) for s in settings]
    if all(any(label in losses[s] for s in settings) for label in (base, subject)):
        # No value of one of them alone: its quantised models no longer make a curve, which is not a small loss.
        text = "; ".join(
            f"{s}: " + " against ".join("none" if math.isnan(v) else f"{v:+.1f} %" for v in (a, b)) for s, a, b in pairs
        )
        verdicts = [None if math.isnan(a) and math.isnan(b) else math.isnan(b) or a < b for _, a, b in pairs]
        holds = False if False in verdicts else None if None in verdicts else True
        report.claim("BD-rate loss by quantisation", f"smaller than {base}'s", text, holds, ["curves"], "quantization")
    return losses


def plot_quantization(report: Report, settings: list[str], panels: dict[str, Costs]) -> None:
    figure, axes = report.axes(len(panels), width=max(3.5, 1.1 * len(settings) + 1))  # (titles need some)
    for axis, (title, costs) in zip(axes, panels.items(), strict=True):
        labels = [label for label in report.study.optimizers if any(label in costs[s] for s in settings)]
        for k, label in enumerate(labels):
            places = np.arange(len(settings)) + 0.8 * k / len(labels)
            values = [costs[s].get(label, math.nan) for s in settings]
            axis.bar(places, values, 0.8 / len(labels), color=report.colours[label], label=label)
            for place, value in zip(places, values, strict=True):
                if math.isnan(value):
                    axis.text(place, 0, "none", ha="center", va="bottom", rotation=90, color=report.colours[label])
        middle = 0.4 - 0.4 / max(1, len(labels))
        axis.set_xticks(np.arange(len(settings)) + middle, [s.replace(" ", "\n") for s in settings])
        axis.set(title=title, xlim=(-0.6, len(settings) - 0.2))
    report.save(
        figure,
        "quantization.png",
        "What quantisation costs each optimizer's models, against the same models in float (none: the quantised models' "
        "quality no longer rises with the rate, or too little of it is common).",
    )


def quantized_models(report: Report, settings: list[str]) -> dict[str, Costs]:
    """The loss R + 255^2 lambda D of every model before and after: of models trained from scratch at one lambda and length,
    which lie far apart in quality, and of the curves' models that go on from one, which do not. Returns the mean changes of
    each, by a title."""
    measured = report.data.rows("quantization")
    base, subject = report.study.baseline, report.study.subject
    scratch = [run for run in report.data.of("horizons", fraction=1.0) if run["run"] in measured]
    started = [run for run in report.data.of("curves") if run["run"] in measured and run["start"]]
    rows, costs = [], {}
    for (text, _), runs, experiment in ((SCRATCH, scratch, "horizons"), (STARTED, started, "curves")):
        changes: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for setting in settings:
            for label in report.study.optimizers:
                losses = []
                for run in (run for run in runs if run["optimizer"] == label):
                    of = {s: [row for row in measured[run["run"]] if row["setting"] == s] for s in ("float", setting)}
                    if all(of.values()):
                        losses.append([mean_loss(rows_, run["lambda"]) for rows_ in of.values()])
                if losses:
                    changes[setting][label] = [100 * (after / before - 1) for before, after in losses]
                    before, after = (spread([pair[k] for pair in losses]) for k in (0, 1))
                    rows.append([text, setting, label, before, after, spread(changes[setting][label], 1) + " %"])
        if changes:
            costs[f"loss, models {text} (%)"] = {s: {k: float(np.mean(v)) for k, v in changes[s].items()} for s in settings}
        pairs = [(s, changes[s].get(subject), changes[s].get(base)) for s in settings]
        if all(a and b for _, a, b in pairs):
            means = [(s, float(np.mean(a)), float(np.mean(b))) for s, a, b in pairs if a and b]
            measured_ = "; ".join(f"{s}: {a:+.1f} % against {b:+.1f} %" for s, a, b in means)
            holds = all(a < b for _, a, b in means)
            claim = f"relative loss by quantisation, models {text}"
            report.claim(claim, f"smaller than {base}'s", measured_, holds, [experiment], "quantization")
    if rows:
        report.text(
            "The loss (bpp in actual bitstreams, 255^2 lambda MSE) over all images; mean and range over seeds and lambdas."
        )
        header = ["models", "weights/activations, rounding, ranges", "optimizer", "loss in float", "quantised", "change"]
        report.table(header, rows)
    return costs


def mean_loss(rows: list[dict[str, str]], lmbda: float) -> float:
    """Of an optimizer's step, on whole images: bpp + 255^2 lambda MSE, MSE of values in [0, 1]."""
    values = [(number(row["bpp"]), 10 ** (-number(row["psnr-rgb"]) / 10)) for row in rows]
    return float(np.mean([bpp + 255**2 * lmbda * mse for bpp, mse in values]))
