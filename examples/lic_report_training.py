"""What a study says of training: learning rates, the time of a step, steps and time to a loss, conflicts between gradients,
ablations, other optimizers and models."""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lic_document import Report, number, plain_numbers, spread
from lic_files import read_table

ALIGNMENTS = {
    "raw_shared": "gradients",
    "preconditioned_shared": "updates within a step",
    "between_steps": "updates of two steps",
}


def learning_rates(report: Report) -> dict[str, float]:
    """The learning-rate grids. Returns each optimizer's best of the longest that begins from new weights."""
    grids: dict[tuple[bool, float], list[dict]] = defaultdict(list)
    for run in report.data.of("rates"):
        grids[bool(run["start"]), run["fraction"]].append(run)
    best: dict[str, float] = {}
    if not grids:
        return best
    report.section("Learning rates")
    report.text(
        "Chosen by the final evaluation loss, on the images on which the losses below are measured: every optimizer has had "
        "the same advantage from that."
    )
    figure, axes = report.axes(len(grids))
    rows = []
    for axis, ((started, _), runs) in zip(axes, sorted(grids.items())):
        steps = f"{runs[0]['steps']:,.0f} steps" + f" from {report.start_of(runs[0])}" * started
        for label in report.study.optimizers:
            losses: dict[float, list[float]] = defaultdict(list)
            for run in runs:
                if run["optimizer"] == label:
                    losses[run["learning_rate"]].append(run["loss"])
            means = {rate: float(np.mean(values)) for rate, values in sorted(losses.items())}
            finite = {rate: mean for rate, mean in means.items() if not math.isnan(mean)}
            plot_grid(axis, losses, finite, report.colours[label], label)
            if finite:
                chosen = min(finite, key=finite.get)
                if not started:
                    best[label] = chosen  # (lengths come in order)
                edge = " (at the edge of the grid)" if chosen in (min(means), max(means)) and len(means) > 1 else ""
                rows.append([label, steps, f"{len(means)}", f"{chosen:g}{edge}", spread(losses[chosen])])
        lowest, ceiling = limits(axis)
        at = [run["learning_rate"] for run in runs]
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="learning rate",
            ylabel="final evaluation loss",
            title=steps,
            xlim=(0.7 * min(at), 1.4 * max(at)),
            ylim=(0.93 * lowest, ceiling),
        )
        axis.set_xticks([], minor=True)
        axis.set_xticks(sorted(set(at)), [f"{rate:g}" for rate in sorted(set(at))], rotation=60, size=8)
        plain_numbers(axis.yaxis)
    report.save(figure, "rates.png", "Final evaluation loss by learning rate; lines join the means, dots are seeds.")
    report.table(["optimizer", "length", "points", "best rate", "its final loss (range over seeds)"], rows)
    return best


def plot_grid(axis, losses: dict[float, list[float]], means: dict[float, float], colour: str, label: str) -> None:
    """Losses by rate, and their means; a rate of `losses` that `means` does not have diverged."""
    if not losses:
        return
    axis.plot(means.keys(), means.values(), "o-", color=colour, label=label)
    for rate in means:
        axis.plot([rate] * len(losses[rate]), losses[rate], ".", color=colour, alpha=0.5)
    place = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "center", "va": "top", "size": 8}
    for rate in losses.keys() - means.keys():
        axis.annotate("diverged", (rate, 0.97), color=colour, **place)


def limits(axis) -> tuple[float, float]:
    """The lowest value, and as much as shows every line's lowest in its surroundings, or all of it."""
    lines = [line.get_ydata() for line in axis.lines if line.get_label()[0] != "_" and len(line.get_ydata())]
    minima = [min(values) for values in lines]
    lowest, highest = min(minima, default=1.0), max(map(max, lines), default=1.0)
    return lowest, max(1.1 * lowest, min(3 * max(minima, default=1.0), 12 * lowest, 1.07 * highest))


def step_times(report: Report) -> dict[str, float]:
    """An optimizer's training step in the baseline's, medians of ratios; where several machines were measured the longest
    of them, so that no claim rests on the best. The table has all of them."""
    model = report.study.plan["train"].get("model", "bmshj2018-hyperprior")
    rows = [row for row in read_table(report.data.folder / "speed.csv") if row["model"] == model]
    machines = sorted({(row["processor"], row["threads"]) for row in rows})
    if not rows:
        return {}
    report.section("Time of a training step")
    found: dict[str, float] = {}
    lines = []
    for machine in machines:
        own = [row for row in rows if (row["processor"], row["threads"]) == machine]
        times = {
            label: np.array([number(row["seconds_per_step"]) for row in own if row["optimizer"] == label])
            for label in report.study.optimizers
        }
        base = times.get(report.study.baseline, np.array([]))
        for label, values in times.items():
            if not len(values):
                continue
            ratio = f"{np.median(values / base):.2f}" if len(base) == len(values) else "-"
            lines.append([machine[0], machine[1], label, f"{1000 * np.median(values):.1f}", ratio])
            if len(base) == len(values):
                found[label] = max(found.get(label, 0.0), float(np.median(values / base)))
    report.table(["processor", "threads", "optimizer", "ms a step", f"of {report.study.baseline}'s"], lines)
    report.text(
        "Batch, forward and backward pass and both optimizers, measured in turn, apart from the training runs; medians, "
        "and medians of the ratios of single rounds. Time to a loss is steps times this; of several machines, the one "
        "where the ratio is largest."
    )
    return found


def draw_losses_by_length(
    report: Report,
    losses: dict[str, dict[float, dict[str, float]]],
    goals: dict[str, float],
    ticks: list[float],
    times: dict[str, float],
) -> None:
    """The picture of :func:`steps_to_a_loss`. losses: by optimizer, length (one of ticks) and seed; goals: by seed."""
    figure, axes = report.axes((3 if times else 2) if report.data.rows("evaluations") else 1)
    axis = axes[0]
    for label, by_fraction in losses.items():
        fractions = sorted(by_fraction)
        finite = {f: [loss for loss in by_fraction[f].values() if not math.isnan(loss)] for f in fractions}
        fractions = [f for f in fractions if finite[f]]
        means, lows, highs = ([of(finite[f]) for f in fractions] for of in (np.mean, min, max))
        axis.fill_between(fractions, lows, highs, color=report.colours[label], alpha=0.15, linewidth=0)
        axis.plot(fractions, means, "o-", color=report.colours[label], label=label)
    if goals:
        goal = float(np.mean(list(goals.values())))
        axis.axhline(
            goal,
            color=report.colours[report.study.baseline],
            linestyle=":",
            label=f"{report.study.baseline} after {report.study.steps:,} steps",
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel=f"length of training (1: {report.study.steps:,} steps)",
        ylabel="final evaluation loss",
        title="each decays over its own length",
    )
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_xticks([], minor=True)
    plain_numbers(axis.yaxis)
    if len(axes) > 1:
        curves_of_training(report, axes[1], axes[2] if times else None, report.data.of("horizons"), times)
    report.save(
        figure,
        "steps.png",
        "Left: final loss by length of training (band: range over seeds)."
        + " Right: the evaluation loss of the longest runs against the step" * (len(axes) > 1)
        + ", and against time as steps times the measured time of a step" * (len(axes) > 2)
        + "." * (len(axes) > 1),
    )


def steps_to_a_loss(report: Report, times: dict[str, float]) -> None:
    """Steps to the baseline's final loss: every optimizer decays over its own horizon."""
    runs = report.data.of("horizons")
    if not runs:
        return
    base, subject = report.study.baseline, report.study.subject
    report.section("Steps and time to a loss")
    losses: dict[str, dict[float, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        losses[run["optimizer"]][run["fraction"]][run["seed"]] = run["loss"]
    goals = {seed: loss for seed, loss in losses[base].get(1.0, {}).items() if not math.isnan(loss)}
    ticks = sorted({f for by_fraction in losses.values() for f in by_fraction})
    draw_losses_by_length(report, losses, goals, ticks, times)
    rows = []
    for label, by_fraction in losses.items():
        reached = {}
        for seed, goal in goals.items():
            hits = [f for f in sorted(by_fraction) if by_fraction[f].get(seed, math.inf) <= goal]
            reached[seed] = min(hits, default=math.nan)
        values = [value for value in reached.values() if not math.isnan(value)]
        ratio = times.get(label)
        steps = f"{max(values):g} (seeds: {', '.join(f'{v:g}' for v in values)})" if values else "not reached"
        if values and len(values) < len(goals):
            steps = f"not by every seed ({', '.join(f'{v:g}' for v in values)})"
        time = f"{max(values) * ratio:.3f}" if ratio and len(values) == len(goals) and values else "-"
        rows.append([label, *(spread(by_fraction[f].values()) for f in ticks), steps, time])
        if label == subject and goals:
            complete = len(values) == len(goals)
            bar = report.study.bars.get("steps", 0.2)
            report.claim(
                f"steps to {base}'s final evaluation loss",
                f"at most {100 * bar:g} %",
                f"{100 * max(values):g} % ({', '.join(f'{100 * v:g}' for v in values)} % by seed)" if complete else steps,
                complete and max(values) <= bar,
                ["horizons"],
            )
            bar = report.study.bars.get("time", 0.25)
            if ratio:
                spent = [100 * v * ratio for v in values]
                report.claim(
                    "time to the same, optimizer included",
                    f"at most {100 * bar:g} %",
                    f"{max(spent):.0f} %" if complete else "not reached",
                    complete and max(spent) <= 100 * bar,
                    ["horizons"],
                )
    header = [
        "optimizer",
        *(f"loss at {t:g}" for t in ticks),
        f"length that reaches {base}'s at 1",
        f"time, of {base}'s at 1",
    ]
    report.table(header, rows)


def curves_of_training(report: Report, by_step, by_time, runs: list[dict], times: dict[str, float]) -> None:
    evaluations = report.data.rows("evaluations")
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
            by_step.plot(steps, losses, color=report.colours[label], alpha=0.8, linewidth=1.2, label=name)
            if by_time is not None and label in times:
                by_time.plot(steps * times[label], losses, color=report.colours[label], alpha=0.8, linewidth=1.2, label=name)
            shown = True
    for axis, what in ((by_step, "step"), (by_time, f"time, in {report.study.baseline}'s steps")):
        if axis is None:
            continue
        if axis.lines:
            values = np.concatenate([line.get_ydata() for line in axis.lines])
            axis.set_ylim(0.95 * values.min(), 12 * values.min())
        axis.set(yscale="log", xlabel=what, ylabel="evaluation loss", xlim=(0, None))
        plain_numbers(axis.yaxis)


def alignments(report: Report) -> None:
    """Along training, of the longest horizons; and of the comparisons, which are shorter."""
    measured = report.data.rows("conflicts")
    runs = [run for run in report.data.of("horizons", fraction=1.0) if run["run"] in measured]
    if not runs:
        runs = best_at_one_length(report, [run for run in report.data.of("rates", start="") if run["run"] in measured])
    if not runs:
        return
    report.section("Conflicts")
    report.text(f"Measured on runs of {runs[0]['steps']:,.0f} steps.")
    base, subject = report.study.baseline, report.study.subject
    along = {label: found for label in report.study.optimizers if (found := Alignment.of(measured, runs, label))}
    plot_alignments(report, along)
    header = ["optimizer", "seeds"] + [f"{what}: {x}" for what in ALIGNMENTS.values() for x in ("mean", "magnitude", "below 0")]
    report.table(header, [[label, *found.row()] for label, found in along.items()])
    compared = [run for run in report.data.of("comparisons") if run["run"] in measured]
    beside = {label: found for label in report.study.optimizers if (found := Alignment.of(measured, compared, label))}
    if beside.keys() - along.keys():
        report.text(f"Of runs of {compared[0]['steps']:,.0f} steps:")
        report.table(header, [[label, *found.row()] for label, found in beside.items()])
    if base not in along or subject not in along:
        return
    shared, between = list(ALIGNMENTS)[1:]
    if found := along[subject].against(along[base], shared):
        report.claim(f"alignment of {ALIGNMENTS[shared]}", f"above {base}'s for most of training", *found, ["horizons"])
    if found := along[subject].against(along[base], between):
        text, holds = found
        momenta = {label: momentum(options | report.study.plan["train"]) for label, options in report.study.optimizers.items()}
        if momenta[subject] != momenta[base]:
            # Momentum alone brings consecutive updates together (ConflictMeter): of itself this is no finding.
            text += f"; but momentum is {momenta[subject]:g} against {momenta[base]:g}"
            equal = equal_momentum(report, momenta, beside)
            at_equal = beside[subject].against(beside[equal], between) if equal else None
            holds = at_equal[1] and holds if at_equal else None if holds else False
            text += f"; {at_equal[0]} with {equal}, {compared[0]['steps']:,.0f} steps" if at_equal else ""
        report.claim(f"alignment of {ALIGNMENTS[between]}", f"above {base}'s for most of training", text, holds, ["horizons"])


def equal_momentum(report: Report, momenta: dict[str, float], measured: dict[str, "Alignment"]) -> str | None:
    """An optimizer measured beside the subject that differs from the baseline in having the subject's momentum."""
    base, subject = report.study.baseline, report.study.subject
    alike = report.study.optimizers[base] | {"betas": None}
    for label, options in report.study.optimizers.items():
        if {subject, label} <= measured.keys() and momenta[label] == momenta[subject]:
            if options | {"betas": None} == alike:
                return label
    return None


@dataclass
class Alignment:
    """An optimizer's alignments along training.

    Attributes:
        steps: [K].
        values: of ALIGNMENTS [S, K], S seeds; NaN where an update has no direction.
    """

    steps: np.ndarray
    values: dict[str, np.ndarray]

    @classmethod
    def of(cls, measured: dict[str, list[dict[str, str]]], runs: list[dict], label: str) -> "Alignment | None":
        tables = [measured[run["run"]] for run in runs if run["optimizer"] == label]
        length = min(map(len, tables), default=0)
        if not length:
            return None
        values = {key: np.array([[number(row[key]) for row in rows[:length]] for rows in tables]) for key in ALIGNMENTS}
        return cls(np.array([number(row["step"]) for row in tables[0][:length]]), values)

    def row(self) -> list[str]:
        """For the table: seeds, and of each the mean, the mean magnitude and how many are below 0."""
        line = [str(len(next(iter(self.values.values()))))]
        for v in self.values.values():
            line += [f"{np.nanmean(v):+.3f}", f"{np.nanmean(np.abs(v)):.3f}", f"{100 * np.mean(v < 0):.0f} %"]
        return line

    def against(self, other: "Alignment", key: str) -> tuple[str, bool] | None:
        """In how many measurements it is above the other's, means over seeds, in words, and whether in most of them."""
        length = min(len(self.steps), len(other.steps))
        a, b = (np.nanmean(each.values[key], axis=0)[:length] for each in (self, other))
        both = np.isfinite(a) & np.isfinite(b)
        if not both.any():
            return None
        share = float(np.mean(a[both] > b[both]))
        means = f"mean {a[both].mean():+.3f} against {b[both].mean():+.3f}"
        return f"in {100 * share:.0f} % of measurements; {means}", share > 0.5


def plot_alignments(report: Report, along: dict[str, Alignment]) -> None:
    figure, axes = report.axes(len(ALIGNMENTS))
    for axis, (key, what) in zip(axes, ALIGNMENTS.items()):
        for label, found in along.items():
            colour, values = report.colours[label], found.values[key]
            spreads = np.array([running_median(each, 9) for each in values])
            axis.fill_between(found.steps, np.nanmin(spreads, 0), np.nanmax(spreads, 0), color=colour, alpha=0.15, linewidth=0)
            axis.plot(found.steps, running_median(np.nanmean(values, axis=0), 9), color=colour, label=label)
        if axis is not axes[-1]:  # (there momentum keeps all near 1)
            axis.axhline(0, color="black", linewidth=0.6)
        axis.set(xlabel="step", title=what, ylabel="alignment")
    report.save(
        figure,
        "conflicts.png",
        "Alignment of rate's and distortion's gradients, of what the optimizer makes of "
        "them (parameters that both reach), and of consecutive updates. Running medians over nine measurements, mean and "
        "range over seeds.",
    )


def best_at_one_length(report: Report, runs: list[dict]) -> list[dict]:
    """Of grids, the best rate's runs at the greatest length that both baseline and subject have: at one step of different
    lengths the rates have decayed differently."""
    lengths = {label: {run["fraction"] for run in runs if run["optimizer"] == label} for label in report.study.optimizers}
    both = lengths[report.study.baseline] & lengths[report.study.subject]
    runs = [run for run in runs if run["fraction"] == max(both, default=None)]
    losses: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        losses[run["optimizer"]][run["learning_rate"]].append(run["loss"])
    best = {label: min(of, key=lambda rate: np.nan_to_num(np.mean(of[rate]), nan=math.inf)) for label, of in losses.items()}
    return [run for run in runs if run["learning_rate"] == best[run["optimizer"]]]


def ablations(report: Report) -> None:
    runs = report.data.of("ablations")
    if not runs:
        return
    report.section("Ablations")
    results = report.data.results()
    by = defaultdict(list)
    for run in runs:
        by[run["optimizer"], run["fraction"], run["variant"], run["learning_rate"]].append(run)
    rows = []
    for (label, fraction, variant, rate), group in sorted(by.items(), key=lambda item: item[0]):
        best = report.study.best_rate(label, results, fraction)
        reference = {run["seed"]: run["loss"] for run in by[label, fraction, "", best]} if best else {}
        changes = [100 * (run["loss"] / reference[run["seed"]] - 1) for run in group if run["seed"] in reference]
        plain = not variant and rate == best
        rows.append(
            [
                label,
                f"{group[0]['steps']:,.0f}",
                variant or ("(as it is)" if plain else "learning rate"),
                f"{rate:g}",
                spread([run["loss"] for run in group]),
                "" if plain or not changes else spread(changes, 1) + " %",
            ]
        )
    header = ["optimizer", "steps", "changed", "rate", "final loss (range over seeds)", "against as it is, seed by seed"]
    report.table(header, rows)


def others(report: Report, experiment: str, title: str) -> None:
    runs = report.data.of(experiment)
    if not runs:
        return
    report.section(title)
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
    report.table(["model", "widths", "optimizer", "steps", "rate", "final loss", "bpp", "PSNR (dB)"], rows)


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
