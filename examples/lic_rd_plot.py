"""The picture of an evaluation: rate-distortion curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from lic_plots import COLOURS  # noqa: E402
from lic_rd import METRICS, Curve, decibels  # noqa: E402

OTHER_COLOURS = ("#7b3294", "#b8860b", "#008b8b", "#d6568c", "#555555", "#8c564b")
CODEC_STYLES = ("--", ":", "-.")  # grey, thin
AXES = {"psnr": "PSNR (dB)", "ms-ssim": "MS-SSIM (dB)"}


def choose_colours(curves: Sequence[Curve]) -> dict[str, str]:
    """Label -> colour: the optimizer's own for its first curve, another for every other."""
    free, colours = list(COLOURS.items()), {}
    others = iter(OTHER_COLOURS * len(curves))
    for curve in curves:
        own = next((item for item in free if item[0] == curve.optimizer), None)
        if own:
            free.remove(own)
        colours[curve.label] = own[1] if own else next(others)
    return colours


def limits(values: np.ndarray, margin: float = 0.06) -> tuple[float, float]:
    low, high = values.min(), values.max()
    room = margin * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def plot_rd(path: Path, curves: Sequence[Curve], remarks: Mapping[str, str] | None = None, title: str = "") -> None:
    """PSNR and, where the images have it, MS-SSIM in dB against bpp.

    One colour per curve: the line joins the means over the seeds, a pale dot is one seed, bars go to the outermost seeds.
    Codecs are thin and grey, and shown over the models' rates only. `remarks` (label -> text) go into the legend.
    """
    remarks = remarks or {}
    models = [curve for curve in curves if not curve.codec] or list(curves)
    metrics = [metric for metric in METRICS if curves[0].images(metric)]
    figure, axes = plt.subplots(1, len(metrics), figsize=(6.2 * len(metrics), 5.4), layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)  # inches
    colours = choose_colours(models)
    for axis, metric in zip(axes[0], metrics):
        in_view = []  # [.., 2], of the models
        for curve in models:
            runs = [decibels(point.values(metric).mean(axis=1), metric) for point in curve.points]  # each [S, 2]
            means = curve.mean_points(metric)
            colour = colours[curve.label]
            axis.plot(*means.T, color=colour, linewidth=2, marker="o", markersize=6, label=curve.label, zorder=3)
            for points, mean in zip(runs, means):
                if len(points) > 1:
                    reach = np.abs(
                        np.stack([points.min(axis=0), points.max(axis=0)]) - mean
                    )  # [2, 2]: down and up; rate, level
                    bars = {"xerr": reach[:, :1], "yerr": reach[:, 1:], "ecolor": colour, "elinewidth": 1.2, "capsize": 3}
                    axis.errorbar(*mean, fmt="none", **bars)
                    axis.plot(*points.T, linestyle="none", marker="o", markersize=4, color=colour, alpha=0.45, mec="none")
                    in_view.append(points)
            in_view.append(means)
        shown = np.concatenate(in_view)
        shown = shown[np.isfinite(shown).all(axis=1)]
        if not len(shown):
            axis.set_title("no finite point")
            continue
        right = shown[:, 0].max()
        levels = [shown[:, 1]]
        for curve, style in zip((c for c in curves if c.codec and c not in models), CODEC_STYLES):
            means = curve.mean_points(metric)
            within = means[means[:, 0] <= 1.12 * right]
            label = curve.label if len(within) else f"{curve.label} (beyond these rates)"
            axis.plot(*means.T, color="#666666", linewidth=1.1, linestyle=style, label=label, zorder=2)
            levels.append(within[:, 1])
        axis.set_xlim(0, 1.12 * right)
        axis.set_ylim(*limits(np.concatenate(levels)))
        with_metric, all_images = curves[0].images(metric), curves[0].images("psnr")
        some = f", {with_metric} of {all_images} images" if with_metric < all_images else ""
        axis.set(xlabel="rate (bpp)", ylabel=AXES[metric] + some)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    texts = [f"{label}: {remarks[label]}" if label in remarks else label for label in labels]
    columns = len(texts) if sum(map(len, texts)) < 50 * len(metrics) else min(2, len(metrics))
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
