"""``python -m bench.plots``: pictures for the README, bench/results/KIND/*.png for each kind of processor, made from the CSVs
beside them and nothing else."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from . import processor
from .models import LIC_MODELS, MODELS
from .results import Row, read

OURS, SOAPS, ADAM = "#c8102e", "#8c9bab", "#d9dee4"
LABELS = {
    "soap_opt fused": "soap_opt",
    "soap_opt multi tensor": "soap_opt, pure PyTorch",
    "pytorch_optimizer SOAP": "pytorch_optimizer SOAP",
    "heavyball SOAP": "HeavyBall SOAP",
    "original SOAP": "original SOAP",
    "bench/reference.py": "straightforward SOAP",
    "Adam fused": "torch Adam (fused)",
}
COLORS = {"soap_opt fused": OURS, "soap_opt multi tensor": "#e58c9a", "Adam fused": ADAM, "Adam foreach": ADAM}
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True})


def steps(folder: Path) -> Figure:
    """Median step of everybody, one panel for each model."""
    data = {model: read(f"step_{model}", folder) for model in MODELS}
    data = {model: rows for model, rows in data.items() if rows}
    measured = {row["optimizer"] for rows in data.values() for row in rows}
    shown = [name for name in LABELS if name in measured]
    columns = 3
    lines = -(-len(data) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(11, 2.0 * lines + 0.4), squeeze=False, layout="constrained")
    for axis in axes.flat[len(data) :]:
        axis.remove()
    for place, (axis, rows) in enumerate(zip(axes.flat, data.values())):
        medians = {row["optimizer"]: row["median_ms"] for row in rows}
        _bars(axis, shown, [medians.get(name, 0.0) for name in shown])
        if place % columns:
            axis.set_yticklabels([])
        axis.set_title(f"{rows[0]['model']}\n{_millions(rows[0]['parameters'])}", fontsize=10)
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
    figure.suptitle(f"One optimizer step on the CPU, median (shorter is better); {_machine(folder, next(iter(data.values())))}")
    return figure


def _bars(axis: Axes, names: list[str], values: list[float]) -> None:
    bars = axis.barh([LABELS[name] for name in names], values, color=[COLORS.get(name, SOAPS) for name in names], height=0.72)
    labels = axis.bar_label(bars, labels=[_milliseconds(value) for value in values], padding=3, fontsize=9)
    labels[0].set_fontweight("bold")
    axis.invert_yaxis()
    axis.set_xlim(0, 1.22 * max(values))
    axis.tick_params(axis="y", length=0)
    axis.get_yticklabels()[0].set_fontweight("bold")


def _milliseconds(value: float) -> str:
    if value == 0:
        return "not run"
    return f"{value / 1e3:.2f} s" if value >= 1000 else f"{value:.3g} ms"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M parameters" if parameters >= 1e6 else f"{parameters:,} parameters"


def _machine(folder: Path, rows: list[Row]) -> str:
    return f"{processor.name_of(folder.name)}, {rows[0]['threads']} threads, float32"


def growth(folder: Path) -> Figure:
    """Cost per parameter and per tensor."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    _curves(left, read("growth_parameters", folder), "parameters", "ns_per_parameter")
    left.set(xlabel="parameters, in layers of 256 x 256", ylabel="ns per parameter and step", yscale="linear")
    left.set_ylim(0, None)
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g} M"))
    left.set_title("As a model grows")
    _curves(right, read("growth_tensors", folder), "tensors", "us_per_tensor")
    right.set(xlabel="tensors of 4 x 4", ylabel="µs per tensor and step", yscale="log")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    right.set_title("As small tensors grow in number")
    return figure


def _curves(axis: Axes, rows: list[Row], x: str, y: str) -> None:
    axis.set_xscale("log")
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        points = [(row[x], row[y]) for row in rows if row["optimizer"] == name]
        ours = name == "soap_opt fused"
        color = "#5b6b7b" if name == "Adam fused" else COLORS.get(name, SOAPS)
        style = "--" if name == "Adam fused" else "-"
        axis.plot(*zip(*points), style, marker="o", color=color, linewidth=2.5 if ours else 1.5, label=LABELS[name])
    axis.grid(True, which="major", color="#e5e8ec")
    axis.minorticks_off()
    axis.legend(frameon=False)


def share(folder: Path) -> Figure:
    """Share of the flop floor at the gemm rate of the same run."""
    data = [read(f"step_{model}", folder) for model in (*LIC_MODELS, "512-table", "gpt2-block", "resnet50")]
    data = [rows for rows in data if rows]
    column = "share_of_floor_1024^3"
    figure, axis = plt.subplots(figsize=(9, 0.55 * len(data) + 1.2), layout="constrained")
    names = [f"{rows[0]['model']}" for rows in data]
    ours = [rows[0][column] for rows in data]
    peers = [max((row[column] for row in rows if row["kind"] == "peer"), default=0.0) for rows in data]
    places = range(len(data))
    for offset, values, color, label in ((-0.19, ours, OURS, "soap_opt"), (0.19, peers, SOAPS, "best other SOAP")):
        bars = axis.barh([place + offset for place in places], values, height=0.36, color=color, label=label)
        axis.bar_label(bars, labels=[f"{100 * value:.0f} %" for value in values], padding=3, fontsize=9)
    axis.set_yticks(places, names)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.axvline(1, color="#5b6b7b", linestyle=":", linewidth=1)
    axis.set_xlim(0, 1.1 * max(1.0, *ours))
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_xlabel("share of the least arithmetic (2.5 U) at the machine's matrix product rate")
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, 1.12), ncols=2)
    return figure


def main() -> None:
    pictures = {steps: "step_*.csv", growth: "growth_*.csv", share: "step_*.csv"}
    for folder in processor.measured():
        for make in [make for make, files in pictures.items() if any(folder.glob(files))]:
            path = folder / f"{make.__name__}.png"
            make(folder).savefig(path, dpi=110, facecolor="white", metadata={"Software": None})
            print(f"{folder.name}/{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
