"""The two pictures of a run: curve.png and reconstructions.png."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402
from torch import Tensor  # noqa: E402

COLOURS = {"soap": "#c1440e", "adam": "#2166ac", "sgd": "#4d7c32", "adamw": "#6a51a3", "muon": "#8c6d1f"}
QUANTITIES = {"loss": "rate-distortion loss", "bpp": "rate (bpp)", "psnr": "PSNR (dB)"}
ALIGNMENTS = {
    "raw_shared": "gradients of rate and distortion",
    "preconditioned_shared": "what the optimizer makes of them",
    "between_steps": "one update and the next",
}
FRAME = "#ffd400"
ENLARGEMENT = 4


@dataclass
class JpegLevel:
    """JPEG's mean PSNR (dB) on the evaluation images, coded at each image's own rate by the model, and its mean rate (bpp):
    above the model's where even JPEG's lowest quality takes more."""

    psnr: float
    bpp: float
    model_bpp: float


def plot_curves(
    path: Path,
    histories: dict[str, list[dict]],
    labels: dict[str, str],
    title: str,
    jpeg: dict[str, JpegLevel] | None = None,
    auxiliary: bool = True,
    stepped: bool = False,
) -> None:
    """One colour per optimizer. Loss, bpp and PSNR (columns) against the step and against the training time (rows), thick with
    dots: the evaluation set; thin: the training crops. Below against the step the learning rate, the auxiliary loss, and the
    alignments where they were measured.

    Args:
        path: of the picture.
        histories: optimizer -> rows of metrics.csv.
        labels: optimizer -> its name.
        title: above everything.
        jpeg: optimizer -> what JPEG reaches at the final model's rates: dashed.
        auxiliary: whether the auxiliary loss is minimised at all.
        stepped: the learning rate falls in steps, not along a curve.
    """
    aligned = any(row["split"] == "conflict" for history in histories.values() for row in history)
    top = [[f"{key} {quantity}" for quantity in QUANTITIES] for key in ("step", "seconds")]
    below = [["learning rate", "auxiliary"] if auxiliary else ["learning rate"], *([list(ALIGNMENTS)] if aligned else [])]
    heights = [5.8, *[2.3] * len(below)]
    figure, axes = plt.subplot_mosaic(  # nested: each row divides the width for itself
        [[top], *([[row]] for row in below)], figsize=(12, 0.6 + sum(heights)), height_ratios=heights, layout="constrained"
    )
    for key, unit in (("step", "step"), ("seconds", "training time (s)")):
        for quantity, label in QUANTITIES.items():
            axis = axes[f"{key} {quantity}"]
            for name, history in histories.items():
                for split, style in (
                    ("train", {"linewidth": 0.8, "alpha": 0.45, "label": f"{labels[name]}, training crops"}),
                    ("eval", {"linewidth": 2, "marker": "o", "markersize": 3, "label": f"{labels[name]}, evaluation"}),
                ):
                    rows = [r for r in history if r["split"] == split]
                    axis.plot([r[key] for r in rows], [r[quantity] for r in rows], color=COLOURS[name], **style)
            levels = (jpeg or {}) if quantity == "psnr" else {}
            lines = [draw_level(axis, level, COLOURS[name], labels[name]) for name, level in levels.items()]
            if lines:
                axis.legend(handles=lines, loc="lower right", fontsize="small")
            axis.set(xlabel=unit, ylabel=label)
            limit_axis(axis, quantity, histories, [level.psnr for level in levels.values()])
    for name, history in histories.items():
        rows = [r for r in history if r["split"] == "train"]
        steps, style = [r["step"] for r in rows], {"color": COLOURS[name], "linewidth": 1.5}
        drawstyle = "steps-pre" if stepped else "default"  # a row's learning rate is that of the steps before it
        axes["learning rate"].plot(steps, [r["learning_rate"] for r in rows], drawstyle=drawstyle, **style)
        if auxiliary:
            axes["auxiliary"].plot(steps, [r["aux_loss"] for r in rows], **style)
        if aligned:
            for column in ALIGNMENTS:
                draw_alignment(axes[column], history, column, COLOURS[name])
    axes["learning rate"].set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    if auxiliary:
        axes["auxiliary"].set(xlabel="step", ylabel="auxiliary loss")
        values = [row["aux_loss"] for history in histories.values() for row in history if row["split"] == "train"]
        if min(values) > 0 and max(values) > 3 * min(values):
            log_scale(axes["auxiliary"], max(values) / min(values))
    if aligned:
        for column, label in ALIGNMENTS.items():
            axes[column].set(xlabel="step", ylabel="alignment", ylim=(-1.05, 1.05))
            axes[column].set_title(label, size="medium")
            axes[column].axhline(0, color="black", linewidth=0.8)
    for axis in axes.values():
        axis.set_xlim(0, None)
        axis.grid(alpha=0.3, which="both")
    figure.suptitle(title)
    handles, names = axes["step loss"].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_level(axis, level: JpegLevel, colour: str, label: str):
    """JPEG's PSNR as a dashed line; returns it."""
    unreached = level.bpp > 1.05 * level.model_bpp
    text = f"JPEG at {level.bpp:.2f} bpp, near its least" if unreached else f"JPEG at {label}'s {level.model_bpp:.2f} bpp"
    return axis.axhline(level.psnr, color=colour, linestyle="--", linewidth=1.2, label=text)


def draw_alignment(axis, history: list[dict], column: str, colour: str) -> None:
    """Dots: the measurements, each of one batch, which scatter; the line: their mean over a tenth of the run around."""
    rows = [r for r in history if r["split"] == "conflict"]
    steps, values = (np.array([r[key] for r in rows], float) for key in ("step", column))
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    axis.plot(steps, values, ".", color=colour, alpha=0.35, markersize=4)
    if len(steps):
        near = abs(steps[:, None] - steps) <= 0.05 * steps.max()  # [n, n]
        axis.plot(steps, near @ values / near.sum(1), color=colour, linewidth=1.5)


def limit_axis(axis, quantity: str, histories: dict[str, list[dict]], levels: list[float]) -> None:
    """Show where learning happens, and the `levels`: the first steps of a random model are tens of times off the scale of the
    rest."""
    rows = [row for history in histories.values() for row in history if row["split"] in ("train", "eval")]
    last = max(row["step"] for row in rows)
    values = [row[quantity] for row in rows if row["step"] > 0.1 * last or row["split"] == "eval"]
    low, high = min(values + levels), max(values + levels)
    if quantity == "loss" and low > 0:
        log_scale(axis, high / low)
        axis.set_ylim(low / 1.08, high * 1.08)
    else:
        margin = 0.05 * (high - low) or 1.0
        axis.set_ylim(low - margin, high + margin)


def log_scale(axis, ratio: float) -> None:
    """A logarithmic ordinate over values of this ratio, with plain numbers beside it."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if ratio < 10 else (1, 2, 5) if ratio < 100 else (1,)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


def most_detailed(image: Tensor, side: int) -> tuple[int, int]:
    """(top, left) of the square of `side` pixels in image [3, H, W] where the luminance changes most from pixel to pixel: with
    the largest mean of |dx| + |dy|."""
    luminance = torch.tensor([0.299, 0.587, 0.114]) @ image.flatten(1)  # [H W], Rec. 601
    luminance = luminance.view(image.shape[-2:])
    change = luminance.diff(dim=0)[:, :-1].abs() + luminance.diff(dim=1)[:-1].abs()  # [H - 1, W - 1]
    means = F.avg_pool2d(change[None], side - 1, stride=1)[0]  # [H - side + 1, W - side + 1]
    top, left = divmod(means.argmax().item(), means.shape[1])
    return top, left


def plot_reconstructions(path: Path, rows: list[list[tuple[str, Tensor]]]) -> None:
    """A grid of (caption, image [3, H, W] in [0, 1]), one row per photograph, drawn at the images' own resolution. Below each
    image the square of a quarter of its shorter side where the row's first one has most detail (framed there), four times
    enlarged, pixel by pixel."""
    dpi, gap, caption = 100, 0.08, 0.36  # dots per inch; inches
    columns = len(rows[0])
    widths = [max(row[c][1].shape[-1] for row in rows) / dpi for c in range(columns)]
    font_size = min(17.0, 4.4 * min(widths))  # two dozen letters fit; large, because pages show it at half its size
    details = []  # (top, left, side) of each row
    for (_, image), *_ in rows:
        side = max(2, min(image.shape[-2:]) // ENLARGEMENT)
        details.append((*most_detailed(image, side), side))
    heights = [row[0][1].shape[-2] / dpi for row in rows]
    width = sum(widths) + gap * (columns + 1)
    height = sum(heights) + sum(ENLARGEMENT * side / dpi for *_, side in details) + (caption + 2 * gap) * len(rows) + gap
    figure = plt.figure(figsize=(width, height), dpi=dpi)

    def draw(image: Tensor, middle: float, top: float, scale: int = 1):
        """With its upper edge at `top` and centred at `middle`, inches from the lower left."""
        w, h = scale * image.shape[-1] / dpi, scale * image.shape[-2] / dpi
        axis = figure.add_axes(((middle - w / 2) / width, (top - h) / height, w / width, h / height))
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.axis("off")
        return axis

    top = height - gap
    for row, row_height, (y, x, side) in zip(rows, heights, details, strict=True):
        left = gap
        for column, ((text, image), column_width) in enumerate(zip(row, widths, strict=True)):
            middle = left + column_width / 2
            figure.text(middle / width, (top - caption / 2) / height, text, ha="center", va="center", size=font_size)
            axis = draw(image, middle, top - caption)
            if column == 0:
                for colour, line in (("black", 4), (FRAME, 2)):  # seen on bright and on dark
                    axis.add_patch(Rectangle((x - 0.5, y - 0.5), side, side, fill=False, edgecolor=colour, linewidth=line))
            draw(image[:, y : y + side, x : x + side], middle, top - caption - row_height - gap, ENLARGEMENT)
            left += column_width + gap
        top -= caption + row_height + ENLARGEMENT * side / dpi + 2 * gap
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
