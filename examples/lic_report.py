"""The report of a study: what its data say to each claim, as pictures, Markdown and one HTML page. Reads the data's CSV tables
only, so that it can be made again from what was kept of runs that are long gone."""

import base64
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from lic_data import InputError  # noqa: E402
from lic_files import write_json  # noqa: E402
from lic_plots import COLOURS  # noqa: E402
from lic_rd import Curve, Delta, NoComparison, Point, bd_rate, bootstrap_delta, markdown  # noqa: E402
from lic_rd_plot import plot_rd  # noqa: E402
from lic_study import Study, read_table  # noqa: E402

EXTRA_COLOURS = ["#8c6d1f", "#1b9e77", "#e7298a", "#7570b3", "#66a61e", "#a6761d"]
ALIGNMENTS = {
    "raw_shared": "gradients",
    "preconditioned_shared": "updates within a step",
    "between_steps": "updates of two steps",
}
LATENTS = ("y", "z")


def number(text: str) -> float:
    return float(text) if text not in ("", None) else math.nan


class Data:
    """The tables of a study, its numbers as floats."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs = {row["run"]: row for row in read_table(folder / "runs.csv")}
        if not self.runs:
            raise InputError(f"{folder} holds no finished run yet")
        for row in self.runs.values():
            for key in ("learning_rate", "steps", "fraction", "lambda", "loss", "bpp", "psnr"):
                row[key] = number(row[key])
            row["experiments"] = row["experiments"].split()

    def rows(self, table: str) -> dict[str, list[dict[str, str]]]:
        """Of a table, by run."""
        by_run = defaultdict(list)
        for row in read_table(self.folder / f"{table}.csv"):
            if row["run"] in self.runs:
                by_run[row["run"]].append(row)
        return by_run

    def of(self, experiment: str, **wanted) -> list[dict]:
        """Runs of an experiment, by their columns."""
        return [
            row
            for row in self.runs.values()
            if experiment in row["experiments"] and all(row[key] == value for key, value in wanted.items())
        ]


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean, and the range over seeds; NaN is a run that failed."""
    values = list(values)
    finite = [value for value in values if not math.isnan(value)]
    failed = f"{len(values) - len(finite)} of {len(values)} failed"
    if not finite:
        return failed if values else "-"
    mean = f"{np.mean(finite):.{digits}f}"
    text = mean if len(finite) == 1 else f"{mean} ({min(finite):.{digits}f} to {max(finite):.{digits}f})"
    return text if len(finite) == len(values) else f"{text}, {failed}"


class Report:
    """Sections in order, each with text, a table or a picture; and the verdict on each claim."""

    def __init__(self, study: Study, data: Data, folder: Path):
        self.study, self.data, self.folder = study, data, folder
        self.parts: list[dict] = []
        self.claims: list[dict] = []
        self.colours = {}
        spare = iter(EXTRA_COLOURS)
        used = set()
        for label, options in study.optimizers.items():
            colour = COLOURS.get(options.get("optimizer", "soap"))
            self.colours[label] = colour if colour not in used else next(spare, "#777777")
            used.add(colour)

    def section(self, title: str) -> None:
        self.parts.append({"kind": "title", "text": title})

    def text(self, text: str) -> None:
        self.parts.append({"kind": "text", "text": text})

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        if rows:
            self.parts.append({"kind": "table", "header": header, "rows": rows})

    def picture(self, name: str, caption: str) -> None:
        self.parts.append({"kind": "picture", "name": name, "caption": caption})

    def claim(self, claim: str, bar: str, measured: str, holds: bool | None, experiment: str = "", table: str = "") -> None:
        """experiment, table: what it rests on. While runs, or what is measured on them, are missing the claim is open, whatever
        those that are there say."""
        if experiment and (missing := self.missing(experiment, table)):
            measured, holds = f"{measured} (so far; runs missing: {missing})", None
        self.claims.append({"claim": claim, "bar": bar, "measured": measured, "holds": holds})

    def missing(self, experiment: str, table: str = "") -> int:
        """How many runs of the baseline and of the subject the study asks for that the data do not have, in a table of theirs
        neither. A run that failed is not missing: it cannot be measured."""
        parts = self.study.plan.get(experiment) or []
        wanted, key = set(), "fraction" if experiment == "horizons" else "lambda"
        for part in parts if isinstance(parts, list) else [parts]:
            labels = {self.study.baseline, self.study.subject} & set(part["optimizers"])
            values = part["fractions"] if experiment == "horizons" else part["lambdas"]
            wanted |= {(a, f"{v:g}", str(seed)) for a in labels for v in values for seed in part.get("seeds", [0])}
        measured = self.data.rows(table) if table else self.data.runs
        runs = [run for run in self.data.of(experiment) if run["run"] in measured or run["failed"] == "True"]
        return len(wanted - {(run["optimizer"], f"{run[key]:g}", run["seed"]) for run in runs})

    def axes(self, columns: int, width: float = 5.2, height: float = 4.0):
        figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False)
        for axis in axes[0]:
            axis.grid(alpha=0.3, which="both")
        return figure, axes[0]

    def save(self, figure, name: str, caption: str) -> None:
        figure.savefig(self.folder / name, dpi=100)
        plt.close(figure)
        self.picture(name, caption)

    # ---- the parts ----

    def rates(self) -> dict[str, float]:
        """The learning-rate grids. Returns each optimizer's best at full length."""
        runs = self.data.of("rates")
        best: dict[str, float] = {}
        if not runs:
            return best
        self.section("Learning rates")
        fractions = sorted({run["fraction"] for run in runs})
        figure, axes = self.axes(len(fractions))
        rows = []
        for axis, fraction in zip(axes, fractions):
            ceiling = 0.0
            at = [run["learning_rate"] for run in runs if run["fraction"] == fraction]
            for label in self.study.optimizers:
                losses = defaultdict(list)
                for run in runs:
                    if run["optimizer"] == label and run["fraction"] == fraction:
                        losses[run["learning_rate"]].append(run["loss"])
                if not losses:
                    continue
                means = {rate: np.mean(values) for rate, values in sorted(losses.items())}
                finite = {rate: mean for rate, mean in means.items() if not math.isnan(mean)}
                axis.plot(finite.keys(), finite.values(), "o-", color=self.colours[label], label=label)
                for rate in finite:
                    axis.plot([rate] * len(losses[rate]), losses[rate], ".", color=self.colours[label], alpha=0.5)
                for rate in means.keys() - finite.keys():
                    axis.annotate(
                        "diverged",
                        (rate, 0.97),
                        xycoords=("data", "axes fraction"),
                        rotation=90,
                        ha="center",
                        va="top",
                        color=self.colours[label],
                        size=8,
                    )
                if not finite:
                    continue
                chosen = min(finite, key=finite.get)
                if fraction == fractions[-1]:
                    best[label] = chosen
                ceiling = max(ceiling, 3 * finite[chosen])
                rates = sorted(means)
                edge = " (at the edge of the grid)" if chosen in (rates[0], rates[-1]) and len(rates) > 1 else ""
                rows.append([label, f"{fraction:g}", f"{len(rates)}", f"{chosen:g}{edge}", spread(losses[chosen])])
            lowest = min((min(line.get_ydata()) for line in axis.lines if len(line.get_ydata())), default=1.0)
            axis.set(
                xscale="log",
                yscale="log",
                xlabel="learning rate",
                ylabel="final evaluation loss",
                title=f"{round(fraction * self.study.steps):,} steps",
                xlim=(0.7 * min(at), 1.4 * max(at)),
                ylim=(0.93 * lowest, max(ceiling, 1.1 * lowest)),
            )
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.legend()
        self.save(figure, "rates.png", "Final evaluation loss by learning rate; lines join the means, dots are seeds.")
        self.table(["optimizer", "length", "points", "best rate", "its final loss (range over seeds)"], rows)
        return best

    def speed(self) -> dict[str, float]:
        """An optimizer's training step in the baseline's, medians of ratios; where several machines were measured the longest
        of them, so that no claim rests on the best. The table has all of them."""
        rows = read_table(self.data.folder / "speed.csv")
        machines = sorted({(row["processor"], row["threads"]) for row in rows})
        if not rows:
            return {}
        self.section("Time of a training step")
        found: dict[str, float] = {}
        lines = []
        for machine in machines:
            own = [row for row in rows if (row["processor"], row["threads"]) == machine]
            times = {
                label: np.array([number(row["seconds_per_step"]) for row in own if row["optimizer"] == label])
                for label in self.study.optimizers
            }
            base = times.get(self.study.baseline, np.array([]))
            for label, values in times.items():
                if not len(values):
                    continue
                ratio = f"{np.median(values / base):.2f}" if len(base) == len(values) else "-"
                lines.append([machine[0], machine[1], label, f"{1000 * np.median(values):.1f}", ratio])
                if len(base) == len(values):
                    found[label] = max(found.get(label, 0.0), float(np.median(values / base)))
        self.table(["processor", "threads", "optimizer", "ms a step", f"of {self.study.baseline}'s"], lines)
        self.text(
            "Batch, forward and backward pass and both optimizers, measured in turn, apart from the training runs; medians, "
            "and medians of the ratios of single rounds. Time to a loss is steps times this; of several machines, the one "
            "where the ratio is largest."
        )
        return found

    def horizons(self, speed: dict[str, float]) -> None:
        """Steps to the baseline's final loss: every optimizer decays over its own horizon."""
        runs = self.data.of("horizons")
        if not runs:
            return
        base, subject = self.study.baseline, self.study.subject
        self.section("Steps and time to a loss")
        losses: dict[str, dict[float, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        for run in runs:
            losses[run["optimizer"]][run["fraction"]][run["seed"]] = run["loss"]
        goals = {seed: loss for seed, loss in losses[base].get(1.0, {}).items() if not math.isnan(loss)}
        figure, axes = self.axes((3 if speed else 2) if self.data.rows("evaluations") else 1)
        axis = axes[0]
        for label, by_fraction in losses.items():
            fractions = sorted(by_fraction)
            finite = {f: [loss for loss in by_fraction[f].values() if not math.isnan(loss)] for f in fractions}
            fractions = [f for f in fractions if finite[f]]
            means, lows, highs = ([of(finite[f]) for f in fractions] for of in (np.mean, min, max))
            axis.fill_between(fractions, lows, highs, color=self.colours[label], alpha=0.15, linewidth=0)
            axis.plot(fractions, means, "o-", color=self.colours[label], label=label)
        if goals:
            goal = float(np.mean(list(goals.values())))
            axis.axhline(goal, color=self.colours[base], linestyle=":", label=f"{base} after {self.study.steps:,} steps")
        axis.set(
            xscale="log",
            yscale="log",
            xlabel=f"length of training (1: {self.study.steps:,} steps)",
            ylabel="final evaluation loss",
            title="each decays over its own length",
        )
        ticks = sorted({f for by_fraction in losses.values() for f in by_fraction})
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.legend()
        if len(axes) > 1:
            self.curves_of_training(axes[1], axes[2] if speed else None, runs, speed)
        self.save(
            figure,
            "steps.png",
            "Left: final loss by length of training (band: range over seeds)."
            + " Right: the evaluation loss of the longest runs against the step" * (len(axes) > 1)
            + ", and against time as steps times the measured time of a step" * (len(axes) > 2)
            + "." * (len(axes) > 1),
        )
        rows = []
        for label, by_fraction in losses.items():
            reached = {}
            for seed, goal in goals.items():
                hits = [f for f in sorted(by_fraction) if by_fraction[f].get(seed, math.inf) <= goal]
                reached[seed] = min(hits, default=math.nan)
            values = [value for value in reached.values() if not math.isnan(value)]
            ratio = speed.get(label)
            steps = f"{max(values):g} (seeds: {', '.join(f'{v:g}' for v in values)})" if values else "not reached"
            if values and len(values) < len(goals):
                steps = f"not by every seed ({', '.join(f'{v:g}' for v in values)})"
            time = f"{max(values) * ratio:.3f}" if ratio and len(values) == len(goals) and values else "-"
            rows.append([label, *(spread(by_fraction[f].values()) for f in ticks), steps, time])
            if label == subject and goals:
                complete = len(values) == len(goals)
                bar = self.study.bars.get("steps", 0.2)
                self.claim(
                    f"steps to {base}'s final evaluation loss",
                    f"at most {100 * bar:g} %",
                    f"{100 * max(values):g} % ({', '.join(f'{100 * v:g}' for v in values)} % by seed)" if complete else steps,
                    complete and max(values) <= bar,
                    "horizons",
                )
                bar = self.study.bars.get("time", 0.25)
                if ratio:
                    spent = [100 * v * ratio for v in values]
                    self.claim(
                        "time to the same, optimizer included",
                        f"at most {100 * bar:g} %",
                        f"{max(spent):.0f} %" if complete else "not reached",
                        complete and max(spent) <= 100 * bar,
                        "horizons",
                    )
        header = [
            "optimizer",
            *(f"loss at {t:g}" for t in ticks),
            f"length that reaches {base}'s at 1",
            f"time, of {base}'s at 1",
        ]
        self.table(header, rows)

    def curves_of_training(self, by_step, by_time, runs: list[dict], speed: dict[str, float]) -> None:
        evaluations = self.data.rows("evaluations")
        longest = {}
        for run in runs:
            longest.setdefault(run["optimizer"], []).append(run["fraction"])
        for label, fractions in longest.items():
            of_label = [r for r in runs if r["optimizer"] == label and r["fraction"] == max(fractions)]
            shown = False
            for run in of_label:
                rows = evaluations.get(run["run"], [])
                steps = np.array([number(row["step"]) for row in rows])
                losses = np.array([number(row["loss"]) for row in rows])
                name = None if shown else label
                by_step.plot(steps, losses, color=self.colours[label], alpha=0.8, linewidth=1.2, label=name)
                if by_time is not None and label in speed:
                    by_time.plot(steps * speed[label], losses, color=self.colours[label], alpha=0.8, linewidth=1.2, label=name)
                shown = True
        for axis, what in ((by_step, "step"), (by_time, f"time, in {self.study.baseline}'s steps")):
            if axis is None:
                continue
            if axis.lines:
                values = np.concatenate([line.get_ydata() for line in axis.lines])
                axis.set_ylim(0.95 * values.min(), 12 * values.min())
                axis.legend()
            axis.set(yscale="log", xlabel=what, ylabel="evaluation loss", xlim=(0, None))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")

    def curves(self) -> None:
        """Rate-distortion curves at equal steps."""
        curves = {curve.label: curve for curve in self.rd_curves("rd")}
        curves = {label: curve for label, curve in curves.items() if len(curve.points) > 1}
        base, subject = self.study.baseline, self.study.subject
        if base not in curves:
            return
        self.section("Rate and distortion")
        rows, remarks = [], {}
        for label, curve in curves.items():
            for point in curve.points:
                mean = point.mean()
                rows.append([label, point.setting, str(len(point.runs)), f"{mean['bpp']:.4f}", f"{mean['psnr-rgb']:.2f}"])
            if label == base:
                continue
            delta = bootstrap_delta(curves[base], curve)
            remarks[label] = self.describe(delta)
            if label == subject:
                bar = self.study.bars.get("bd-rate", -3)
                self.claim(
                    f"BD-rate against {base} at equal steps",
                    f"{bar:g} % or better, the interval excluding 0",
                    self.describe(delta),
                    None if math.isnan(delta.value) else delta.value <= bar and delta.high < 0,
                    "curves",
                    "rd",
                )
            for note in delta.notes:
                self.text(f"{label}: {note}.")
        plot_rd(self.folder / "rd.png", list(curves.values()), {label: f"BD-rate {text}" for label, text in remarks.items()})
        self.picture(
            "rd.png", f"Rate-distortion curves over {self.images()} images, actual bitstreams; BD-rate against {base}."
        )
        self.table(["optimizer", "lambda", "seeds", "bpp", "PSNR (dB)"], rows)

    def images(self) -> int:
        return len({row["image"] for rows in self.data.rows("rd").values() for row in rows})

    @staticmethod
    def describe(delta: Delta) -> str:
        if math.isnan(delta.value):
            return "no value"
        interval = f" [{delta.low:+.1f}, {delta.high:+.1f}]" if not math.isnan(delta.low) else ""
        return f"{delta.value:+.1f} %{interval}"

    def rd_curves(self, table: str, keep: Callable[[dict], bool] = lambda row: True) -> list[Curve]:
        """One curve for each optimizer over the lambdas of the experiment "curves"."""
        measured = self.data.rows(table)
        points: dict[str, dict[float, dict[str, list[dict]]]] = defaultdict(lambda: defaultdict(dict))
        for run in self.data.of("curves"):
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
                optimizer=self.study.optimizers[label].get("optimizer", "soap"),
            )
            for label, by_lambda in points.items()
        ]

    def conflicts(self) -> None:
        """Alignments along training, of the longest horizons."""
        measured = self.data.rows("conflicts")
        runs = [run for run in self.data.of("horizons", fraction=1.0) if run["run"] in measured]
        if not runs:
            runs = [run for run in self.data.of("rates") if run["run"] in measured]
            of = {label: {run["fraction"] for run in runs if run["optimizer"] == label} for label in self.study.optimizers}
            both = of[self.study.baseline] & of[self.study.subject]  # at one step the lengths decay differently
            runs = [run for run in runs if run["fraction"] == max(both, default=None)]
            best = self.best_of(runs)
            runs = [run for run in runs if best.get(run["optimizer"]) == (run["fraction"], run["learning_rate"])]
        if not runs:
            return
        self.section("Conflicts")
        self.text(f"Measured on runs of {runs[0]['steps']:,.0f} steps.")
        base, subject = self.study.baseline, self.study.subject
        figure, axes = self.axes(len(ALIGNMENTS))
        means: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        steps_of = {}
        rows = []
        for label in self.study.optimizers:
            of_label = [measured[run["run"]] for run in runs if run["optimizer"] == label]
            if not of_label:
                continue
            length = min(map(len, of_label))
            steps_of[label] = np.array([number(row["step"]) for row in of_label[0][:length]])
            line = [label, str(len(of_label))]
            for axis, key in zip(axes, ALIGNMENTS):
                values = np.array([[number(row[key]) for row in rows_[:length]] for rows_ in of_label])  # [S, K]
                mean = np.nanmean(values, axis=0)
                means[label][key] = mean
                smooth = running_median(mean, 9)
                spreads = np.array([running_median(each, 9) for each in values])
                axis.fill_between(
                    steps_of[label],
                    np.nanmin(spreads, 0),
                    np.nanmax(spreads, 0),
                    color=self.colours[label],
                    alpha=0.15,
                    linewidth=0,
                )
                axis.plot(steps_of[label], smooth, color=self.colours[label], label=label)
                line += [f"{np.nanmean(mean):+.3f}", f"{np.nanmean(np.abs(values)):.3f}", f"{100 * np.mean(values < 0):.0f} %"]
            rows.append(line)
        for axis, what in zip(axes, ALIGNMENTS.values()):
            if axis is not axes[-1]:  # (there momentum keeps all near 1)
                axis.axhline(0, color="black", linewidth=0.6)
            axis.set(xlabel="step", title=what, ylabel="alignment")
            axis.legend()
        self.save(
            figure,
            "conflicts.png",
            "Alignment of rate's and distortion's gradients, of what the optimizer makes of "
            "them (parameters that both reach), and of consecutive updates. Running medians over nine measurements, mean and "
            "range over seeds.",
        )
        header = ["optimizer", "seeds"] + [
            f"{what}: {x}" for what in ALIGNMENTS.values() for x in ("mean", "|mean|", "below 0")
        ]
        self.table([text.replace("|mean|", "mean magnitude") for text in header], rows)
        if base in means and subject in means:
            for key, what in list(ALIGNMENTS.items())[1:]:
                length = min(len(means[base][key]), len(means[subject][key]))
                a, b = means[base][key][:length], means[subject][key][:length]
                both = np.isfinite(a) & np.isfinite(b)
                if not both.any():
                    continue
                share = float(np.mean(b[both] > a[both]))
                measured_ = f"in {100 * share:.0f} % of measurements; mean {b[both].mean():+.3f} against {a[both].mean():+.3f}"
                holds: bool | None = share > 0.5
                betas = [momentum(self.study.optimizers[label] | self.study.plan["train"]) for label in (subject, base)]
                if key == "between_steps" and betas[0] != betas[1]:
                    # Momentum alone brings consecutive updates together (ConflictMeter): of itself this is no finding.
                    measured_ += f"; but momentum is {betas[0]:g} against {betas[1]:g}"
                    holds = None if holds else False
                self.claim(f"alignment of {what}", f"above {base}'s for most of training", measured_, holds, "horizons")

    def best_of(self, runs: list[dict]) -> dict[str, tuple[float, float]]:
        losses = defaultdict(lambda: defaultdict(list))
        for run in runs:
            losses[run["optimizer"]][run["fraction"], run["learning_rate"]].append(run["loss"])
        return {
            label: min(settings, key=lambda s: (-s[0], np.nan_to_num(np.mean(settings[s]), nan=math.inf)))
            for label, settings in losses.items()
        }

    def outliers(self) -> None:
        measured = self.data.rows("outliers")
        base, subject = self.study.baseline, self.study.subject
        # Outliers grow with lambda and length: only runs that are alike but for the optimizer stand beside each other.
        settings: dict[str, dict[tuple, str]] = defaultdict(dict)
        for name in measured:
            run = self.data.runs[name]
            setting = tuple(run[key] for key in ("model", "variant", "steps", "lambda", "seed"))
            settings[run["optimizer"]][setting] = name
        common = settings[base].keys() & settings[subject].keys()
        if not common:
            return
        by: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        for label in (label for label in self.study.optimizers if common <= settings[label].keys()):
            for row in (row for setting in common for row in measured[settings[label][setting]]):
                for key in ("kurtosis_channels", "kurtosis", "max_over_median", "beyond_6_sigma"):
                    by[label][row["layer"]][key].append(number(row[key]))
        self.section("Outliers")
        self.text(f"Means over {len(common)} runs of each optimizer, alike in model, length, lambda and seed.")
        if left_out := [label for label in self.study.optimizers if settings[label] and label not in by]:
            self.text(f"Not measured on all of these runs, and left out: {', '.join(left_out)}.")
        layers = [layer for layer in by[base] if layer in by[subject]]
        mean = {
            label: {
                layer: {key: float(np.nanmean(v)) if not np.all(np.isnan(v)) else math.nan for key, v in of.items()}
                for layer, of in by[label].items()
            }
            for label in by
        }
        figure, axes = self.axes(2, width=7.5, height=5.0)
        for axis, key, what in zip(axes, ("kurtosis_channels", "kurtosis"), ("of the channels' RMS", "of the values")):
            places = np.arange(len(layers))
            for k, label in enumerate(by):
                axis.barh(
                    places + 0.8 * k / len(by),
                    [mean[label][layer][key] for layer in layers],
                    0.8 / len(by),
                    color=self.colours[label],
                    label=label,
                )
            axis.set_yticks(places + 0.4 - 0.4 / len(by), layers, size=8)
            axis.invert_yaxis()
            axis.set(xscale="log", title=f"kurtosis {what}")
            axis.set_xlim(left=1)  # its least: bars that began elsewhere would lie about their ratio
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("{x:g}")
            axis.legend()
        self.save(figure, "outliers.png", "Kurtosis of every layer's output and of the latents, means over the runs measured.")
        rows = []
        for label in by:
            for layer in (layer for layer in LATENTS if layer in by[label]):
                values = mean[label][layer]
                rows.append(
                    [
                        label,
                        layer,
                        f"{values['kurtosis_channels']:.2f}",
                        f"{values['kurtosis']:.2f}",
                        f"{values['max_over_median']:.1f}",
                        f"{100 * values['beyond_6_sigma']:.3f} %",
                    ]
                )
        self.table(["optimizer", "latent", "kurtosis (channels)", "kurtosis (values)", "max / median", "beyond 6 sigma"], rows)
        lower = {
            key: sum(mean[subject][layer][key] < mean[base][layer][key] for layer in layers)
            for key in ("kurtosis_channels", "kurtosis", "max_over_median")
        }
        latents = [layer for layer in LATENTS if layer in layers]
        keys = ("kurtosis_channels", "kurtosis", "max_over_median")
        fine = all(mean[subject][layer][key] < mean[base][layer][key] for layer in latents for key in keys)
        most = all(count > len(layers) / 2 for count in lower.values())
        self.claim(
            "outliers",
            f"lower than {base}'s in the latents and most layers",
            f"lower in {lower['kurtosis_channels']} (kurtosis of channels), {lower['kurtosis']} (of values) and "
            f"{lower['max_over_median']} (max / median) of {len(layers)} layers and latents; latents "
            + ("lower in all three" if fine else "not lower in all three"),
            fine and most,
            "curves" if self.data.of("curves") else "",
            "outliers",
        )

    def quantization(self) -> None:
        measured = self.data.rows("quantization")
        settings = list(
            dict.fromkeys(row["setting"] for rows in measured.values() for row in rows if row["setting"] != "float")
        )
        base, subject = self.study.baseline, self.study.subject
        if not settings:
            return
        self.section("Quantisation after training")
        whole = {curve.label: curve for curve in self.rd_curves("quantization", lambda row: row["setting"] == "float")}
        losses: dict[str, dict[str, float]] = defaultdict(dict)
        rows = []
        for setting in settings:
            for curve in self.rd_curves("quantization", lambda row, setting=setting: row["setting"] == setting):
                label = curve.label
                try:
                    value = bd_rate(whole[label].mean_points("psnr"), curve.mean_points("psnr"), names=("float", setting))
                    text = f"{value:+.1f} %"
                except NoComparison as error:
                    value, text = math.nan, f"- ({error})"
                losses[setting][label] = value
                before = {point.setting: point.mean() for point in whole[label].points}
                bpp = np.mean([p.mean()["bpp"] / before[p.setting]["bpp"] - 1 for p in curve.points])
                psnr = np.mean([p.mean()["psnr-rgb"] - before[p.setting]["psnr-rgb"] for p in curve.points])
                rows.append([setting, label, text, f"{100 * bpp:+.1f} %", f"{psnr:+.2f}"])
        self.table(["weights/activations, rounding, ranges", "optimizer", "BD-rate loss", "bpp", "PSNR (dB)"], rows)
        shown = [s for s in settings if any(not math.isnan(v) for v in losses[s].values())]
        if shown:
            figure, (axis,) = self.axes(1, width=1.6 * len(shown) + 3)
            labels = [label for label in self.study.optimizers if any(label in losses[s] for s in shown)]
            for k, label in enumerate(labels):
                axis.bar(
                    np.arange(len(shown)) + 0.8 * k / len(labels),
                    [losses[s].get(label, math.nan) for s in shown],
                    0.8 / len(labels),
                    color=self.colours[label],
                    label=label,
                )
            axis.set_xticks(np.arange(len(shown)) + 0.4 - 0.4 / len(labels), [s.replace(" ", "\n") for s in shown])
            axis.set(ylabel="BD-rate loss against the float model (%)")
            axis.legend()
            self.save(
                figure, "quantization.png", "What quantisation costs each optimizer's models, against the same models in float."
            )
        pairs = [(s, losses[s].get(subject, math.nan), losses[s].get(base, math.nan)) for s in settings]
        if all(any(label in losses[s] for s in settings) for label in (base, subject)):
            # No value of one of them alone: its quantised models no longer make a curve, which is not a small loss.
            text = "; ".join(
                f"{s}: " + " against ".join("none" if math.isnan(v) else f"{v:+.1f} %" for v in (a, b)) for s, a, b in pairs
            )
            verdicts = [None if math.isnan(a) and math.isnan(b) else math.isnan(b) or a < b for _, a, b in pairs]
            holds = False if False in verdicts else None if None in verdicts else True
            self.claim("BD-rate loss by quantisation", f"smaller than {base}'s", text, holds, "curves", "quantization")

    def ablations(self) -> None:
        runs = self.data.of("ablations")
        if not runs:
            return
        self.section("Ablations")
        by = defaultdict(list)
        for run in runs:
            by[run["optimizer"], run["fraction"], run["variant"], run["learning_rate"]].append(run)
        rows = []
        for (label, fraction, variant, rate), group in sorted(by.items(), key=lambda item: item[0]):
            plain_runs = [run for (a, f, v, _), g in by.items() if (a, f, v) == (label, fraction, "") for run in g]
            reference = {run["seed"]: run["loss"] for run in plain_runs}
            changes = [100 * (run["loss"] / reference[run["seed"]] - 1) for run in group if run["seed"] in reference]
            change = spread(changes, 1) + " %" if variant and changes else ""
            rows.append(
                [
                    label,
                    f"{round(fraction * self.study.steps):,}",
                    variant or "(as it is)",
                    f"{rate:g}",
                    spread([run["loss"] for run in group]),
                    change,
                ]
            )
        self.table(
            ["optimizer", "steps", "changed", "rate", "final loss (range over seeds)", "against as it is, seed by seed"], rows
        )

    def others(self, experiment: str, title: str) -> None:
        runs = self.data.of(experiment)
        if not runs:
            return
        self.section(title)
        by = defaultdict(list)
        for run in runs:
            by[run["model"], run["variant"], run["optimizer"], run["steps"], run["learning_rate"]].append(run)
        rows = [
            [
                Path(model).name,
                variant,
                label,
                f"{steps:,.0f}",
                f"{rate:g}",
                *(spread([run[key] for run in group], digits) for key, digits in (("loss", 3), ("bpp", 3), ("psnr", 2))),
            ]
            for (model, variant, label, steps, rate), group in by.items()
        ]
        self.table(["model", "widths", "optimizer", "steps", "rate", "final loss", "bpp", "PSNR (dB)"], rows)

    # ---- writing ----

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        best = self.rates()
        speed = self.speed()
        self.horizons(speed)
        self.curves()
        with warnings.catch_warnings():  # what has no direction in any seed (SOAP's first step) stays NaN, and is not drawn
            warnings.filterwarnings("ignore", "Mean of empty slice|All-NaN", RuntimeWarning)
            self.conflicts()
        self.outliers()
        self.quantization()
        self.others("comparisons", "Other optimizers")
        self.others("models", "Other models")
        self.ablations()
        failed = [name for name, run in self.data.runs.items() if run["failed"] == "True"]
        if failed:
            self.section("Runs that had to stop")
            self.text(", ".join(failed))
        write_json(self.folder / "summary.json", {"claims": self.claims, "best_rates": best, "runs": len(self.data.runs)})
        (self.folder / "report.md").write_text(self.as_markdown())
        (self.folder / "report.html").write_text(self.as_html())

    def verdict(self, claim: dict) -> str:
        return {True: "holds", False: "does not hold", None: "open"}[claim["holds"]]

    def claims_table(self) -> tuple[list[str], list[list[str]]]:
        rows = [[c["claim"], c["bar"], c["measured"], self.verdict(c)] for c in self.claims]
        return ["claim", "bar", "measured", ""], rows

    def as_markdown(self) -> str:
        lines = [f"# {self.study.title}", "", f"{len(self.data.runs)} runs.", ""]
        if self.claims:
            lines += [markdown(*self.claims_table()), ""]
        for part in self.parts:
            if part["kind"] == "title":
                lines += [f"## {part['text']}", ""]
            elif part["kind"] == "text":
                lines += [part["text"], ""]
            elif part["kind"] == "table":
                lines += [markdown(part["header"], part["rows"]), ""]
            else:
                lines += [f"![{part['caption']}]({part['name']})", "", part["caption"], ""]
        return "\n".join(lines)

    def as_html(self) -> str:
        parts = [
            part | {"data": base64.b64encode((self.folder / part["name"]).read_bytes()).decode()}
            if part["kind"] == "picture"
            else part
            for part in self.parts
        ]
        header, rows = self.claims_table()
        template = jinja2.Environment(autoescape=True).from_string(PAGE)
        return template.render(title=self.study.title, count=len(self.data.runs), header=header, rows=rows, parts=parts)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px }
td, th { border-bottom: 1px solid #ddd; padding: 4px 10px; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #888 } img { max-width: 100% } figcaption { color: #555; font-size: 13px }
.holds { color: #1a7f37 } .not { color: #b42318 }
</style></head><body>
<h1>{{ title }}</h1><p>{{ count }} runs.</p>
{% if rows %}<table><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td{% if loop.last %} class="{{ 'holds' if cell == 'holds' else 'not' }}"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}
{% for part in parts %}
{% if part.kind == "title" %}<h2>{{ part.text }}</h2>
{% elif part.kind == "text" %}<p>{{ part.text }}</p>
{% elif part.kind == "table" %}<table><tr>{% for cell in part.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in part.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{% else %}<figure><img src="data:image/png;base64,{{ part.data }}" alt="{{ part.caption }}"><figcaption>{{ part.caption }}</figcaption></figure>
{% endif %}{% endfor %}
</body></html>
"""  # noqa: E501


def momentum(options: dict) -> float:
    """Of the optimizer that these options of train_lic.py make: its first beta, or SGD's momentum."""
    if betas := options.get("betas"):
        return float(betas[0])
    return 0.95 if options.get("optimizer", "soap") in ("soap", "muon") else 0.9


def running_median(values: np.ndarray, width: int) -> np.ndarray:
    """Of values [K], over `width` neighbours; NaN where all of them are."""
    half = width // 2
    with np.errstate(all="ignore"):
        return np.array(
            [
                np.nanmedian(part) if np.isfinite(part := values[max(0, i - half) : i + half + 1]).any() else math.nan
                for i in range(len(values))
            ]
        )


def write_report(study: Study, data: Path, folder: Path) -> None:
    """All pictures, report.md, report.html (one file) and summary.json, from the tables in `data`.

    Raises:
        InputError: no run has finished yet, or the data are of optimizers that the study does not have.
    """
    tables = Data(data)
    if unknown := {run["optimizer"] for run in tables.runs.values()} - study.optimizers.keys():
        raise InputError(f"{data} has runs of {', '.join(sorted(unknown))}, which {study.path} does not: another study's data?")
    Report(study, tables, folder).write()
    print(f"The report is in {folder}/")


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())
