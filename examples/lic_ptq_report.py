"""Tables and the picture of quantize_lic.py."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402
from lic_rd import markdown
from matplotlib.ticker import SymmetricalLogLocator


def setting_name(row: dict) -> str:
    if row["rounding"] == "float":
        return "float"
    rounding = {"nearest": "nearest", "adaround": "AdaRound"}[row["rounding"]]
    ranges = row["ranges"] if row["ranges"] == row["weight_ranges"] else f"{row['ranges']}, weights {row['weight_ranges']}"
    return f"W{row['weight_bits']}A{row['activation_bits']} {rounding}, {ranges}"


def rows_table(rows: list[dict]) -> str:
    coded = all("bpp" in row for row in rows)
    header = ["checkpoint", "lambda", "setting", "loss", "loss, %", "bpp, estimated", "PSNR, forward"]
    header += ["bpp, actual", "bpp, %", "PSNR, decoded", "PSNR, change"] if coded else []
    lines = []
    for row in rows:
        line = [row["checkpoint"], f"{row['lambda']:g}", setting_name(row), f"{row['loss']:.4f}"]
        line += [f"{row['loss_increase_percent']:+.2f}", f"{row['bpp_estimated']:.4f}", f"{row['psnr_forward']:.3f}"]
        if coded:
            line += [f"{row['bpp']:.4f}", f"{row['bpp_increase_percent']:+.2f}", f"{row['psnr']:.3f}"]
            line += [f"{row['psnr_change']:+.3f}"]
        lines.append(line)
    return markdown(header, lines)


def curves_table(curves: list[dict]) -> str:
    lines = []
    for curve in curves:
        rate = f"{curve['bd_rate_percent']:+.2f}" if "bd_rate_percent" in curve else f"none: {curve['note']}"
        lines.append([curve["curve"], curve["setting"], str(curve["lambdas"]), rate])
    return markdown(["curve", "setting", "lambdas", "BD-rate against float, %"], lines)


def plot(path: Path, rows: list[dict], curves: list[dict]) -> None:
    """What each setting costs: of the loss, for each checkpoint; of the rate at equal PSNR, for each curve, with the curves."""
    settings = [name for name in dict.fromkeys(setting_name(row) for row in rows) if name != "float"]
    losses = {name: {} for name in dict.fromkeys(row["checkpoint"] for row in rows)}
    for row in rows:
        losses[row["checkpoint"]][setting_name(row)] = row["loss_increase_percent"]
    rates = {label: {} for label in dict.fromkeys(curve["curve"] for curve in curves)}
    for curve in curves:
        rates[curve["curve"]][curve["setting"]] = curve.get("bd_rate_percent")

    panels = 3 if curves else 1
    height = min(16.0, max(4.5, 1.5 + 0.2 * len(settings) * (len(losses) + 1)))
    figure, axes = plt.subplots(1, panels, figsize=(7 * panels, height), layout="constrained", squeeze=False)
    draw_bars(axes[0, 0], settings, losses, "loss above the float model's (%)")
    if curves:
        if any(value is not None for values in rates.values() for value in values.values()):
            draw_bars(axes[0, 1], settings, rates, "BD-rate against the float models (%)")
        else:
            axes[0, 1].text(0.5, 0.5, f"no BD-rate:\n{curves[0]['note']}", ha="center", va="center", wrap=True)
            axes[0, 1].axis("off")
        draw_curves(axes[0, 2], settings, curves)
    figure.suptitle("Post-training quantisation, simulated (W: bits of weights, A: of activations)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_bars(axis, settings: list[str], series: dict[str, dict[str, float | None]], label: str) -> None:
    """Horizontal bars: a group for each setting, a colour for each name; the value written at the bar's end."""
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        drawn = [(j, values[setting]) for j, setting in enumerate(settings) if values.get(setting) is not None]
        places = [j + (i + 0.5) * width - 0.4 for j, _ in drawn]
        colour = plt.get_cmap("tab10" if len(series) <= 10 else "tab20")(i % 20)
        bars = axis.barh(places, [value for _, value in drawn], height=0.9 * width, label=name, color=colour)
        axis.bar_label(bars, [f"{value:+.2f}" for _, value in drawn], padding=2, fontsize=7)
    axis.set_yticks(range(len(settings)), settings)
    axis.invert_yaxis()
    axis.set_xscale("symlog", linthresh=1, subs=(2, 5))  # 8 bits cost parts of a percent, 4 bits tens
    axis.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(label)
    axis.margins(x=0.12)
    axis.grid(alpha=0.3, axis="x")
    axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def draw_curves(axis, settings: list[str], curves: list[dict]) -> None:
    """The rate-distortion curves: a colour for each setting, a style of line for each recipe."""
    shades = plt.get_cmap("plasma")([0.9 * i / max(1, len(settings) - 1) for i in range(len(settings))])
    colours = {"float": "black"} | dict(zip(settings, shades))
    labels = list(dict.fromkeys(curve["curve"] for curve in curves))
    for curve in curves:
        style = ("-", "--", "-.", ":")[labels.index(curve["curve"]) % 4]
        label = curve["setting"] if len(labels) == 1 else f"{curve['curve']}: {curve['setting']}"
        rate, psnr = zip(*curve["points"])
        axis.plot(rate, psnr, style, marker="o", markersize=3, color=colours[curve["setting"]], label=label)
    axis.set(xlabel="rate (bpp)", ylabel="PSNR (dB)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
