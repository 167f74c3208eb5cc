"""The two pictures of a run: curve.png and reconstructions.png."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402
from torch import Tensor  # noqa: E402

COLOURS = {"soap": "#c1440e", "adam": "#2166ac", "sgd": "#4d7c32", "adamw": "#6a51a3", "muon": "#8c6d1f"}
QUANTITIES = {"loss": "rate-distortion loss", "bpp": "rate (bpp)", "psnr": "PSNR (dB)"}


def plot_curves(path: Path, histories: dict[str, list[dict]], labels: dict[str, str], title: str) -> None:
    """Loss, bpp and PSNR (columns) against the step and against the training time (rows), one colour per optimizer.

    Thick with dots: the evaluation set; thin: the training crops.
    """
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), sharey="col", layout="constrained")
    for row, (key, unit) in zip(axes, (("step", "step"), ("seconds", "training time (s)")), strict=True):
        for axis, (quantity, label) in zip(row, QUANTITIES.items(), strict=True):
            for name, history in histories.items():
                for split, style in (
                    ("train", {"linewidth": 0.8, "alpha": 0.45, "label": f"{labels[name]}, training crops"}),
                    ("eval", {"linewidth": 2, "marker": "o", "markersize": 3, "label": f"{labels[name]}, evaluation"}),
                ):
                    rows = [r for r in history if r["split"] == split]
                    axis.plot([r[key] for r in rows], [r[quantity] for r in rows], color=COLOURS[name], **style)
            axis.set(xlabel=unit, ylabel=label, xlim=(0, None))
            axis.grid(alpha=0.3, which="both")
    for column, quantity in enumerate(QUANTITIES):
        limit_axis(axes[0, column], quantity, histories)
    figure.suptitle(title)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def limit_axis(axis, quantity: str, histories: dict[str, list[dict]]) -> None:
    """Show where learning happens: the first steps of a random model are tens of times off the scale of the rest."""
    rows = [row for history in histories.values() for row in history if row["split"] in ("train", "eval")]
    last = max(row["step"] for row in rows)
    values = [row[quantity] for row in rows if row["step"] > 0.1 * last or row["split"] == "eval"]
    low, high = min(values), max(values)
    if quantity == "loss" and low > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if high / low < 10 else (1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylim(low / 1.08, high * 1.08)
    else:
        margin = 0.05 * (high - low) or 1.0
        axis.set_ylim(low - margin, high + margin)


def plot_reconstructions(path: Path, rows: list[list[tuple[str, Tensor]]]) -> None:
    """A grid of (caption, image [3, H, W] in [0, 1]), one row per photograph, drawn at the images' own resolution."""
    dpi, gap, caption = 100, 0.08, 0.36  # dots per inch; inches
    columns = len(rows[0])
    widths = [max(row[c][1].shape[-1] for row in rows) / dpi for c in range(columns)]
    heights = [max(image.shape[-2] for _, image in row) / dpi for row in rows]
    font_size = min(17.0, 4.4 * min(widths))  # two dozen letters fit; large, because pages show it at half its size
    width = sum(widths) + gap * (columns + 1)
    height = sum(heights) + (caption + gap) * len(rows) + gap
    figure = plt.figure(figsize=(width, height), dpi=dpi)
    top = height - gap
    for row, row_height in zip(rows, heights, strict=True):
        left = gap
        for (text, image), column_width in zip(row, widths, strict=True):
            w, h = image.shape[-1] / dpi, image.shape[-2] / dpi
            x, y = left + (column_width - w) / 2, top - caption - h
            axis = figure.add_axes((x / width, y / height, w / width, h / height))
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.axis("off")
            middle = ((left + column_width / 2) / width, (top - caption / 2) / height)
            figure.text(*middle, text, ha="center", va="center", size=font_size)
            left += column_width + gap
        top -= caption + row_height + gap
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
