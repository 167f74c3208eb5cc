"""examples/evaluate_lic.py and its parts: Bjontegaard deltas against what can be worked out, and curves of real models."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import compressai.utils.eval_model.__main__ as eval_model
import compressai.utils.plot.__main__ as compressai_plot
import evaluate_lic
import lic_data
import lic_evaluation
import lic_models
import lic_rd
import numpy as np
import pytest
import torch
import train_lic
from lic_rd import Curve, NoComparison, Point, bd_psnr, bd_rate, bootstrap_delta
from lic_rd_plot import plot_rd
from PIL import Image
from scipy.interpolate import PchipInterpolator

CURVE = np.array([[0.12, 27.1], [0.25, 29.6], [0.48, 32.2], [0.95, 35.3]])  # bpp, dB
LAMBDAS = ("0.0035", "0.013", "0.0483", "0.18")


# ---- Bjontegaard deltas ----


@pytest.mark.parametrize("method", lic_rd.METHODS)
def test_a_curve_shifted_in_rate(method):
    for percent in (-10, 10, -50, 100):
        shifted = CURVE * [1 + percent / 100, 1]
        assert bd_rate(CURVE, shifted, method) == pytest.approx(percent, abs=1e-8)
        assert bd_rate(shifted[::-1], CURVE[[2, 0, 3, 1]], method) == pytest.approx(100 / (1 + percent / 100) - 100, abs=1e-8)


@pytest.mark.parametrize("method", lic_rd.METHODS)
def test_a_curve_shifted_in_quality(method):
    assert bd_psnr(CURVE, CURVE + [0, 0.7], method) == pytest.approx(0.7, abs=1e-9)


@pytest.mark.parametrize("method", lic_rd.METHODS)
def test_straight_lines_over_what_they_have_in_common(method):
    """PSNR = 30 + 8 log10(bpp): 0.4 dB more is 10^(-0.4 / 8) of the rate, whichever part of the line the points are on."""
    rates, others = np.array([0.1, 0.2, 0.5, 1.0]), np.array([0.15, 0.3, 0.9, 1.4, 1.6])
    line = np.stack([rates, 30 + 8 * np.log10(rates)], axis=1)
    above = np.stack([others, 30.4 + 8 * np.log10(others)], axis=1)
    assert bd_psnr(line, above, method) == pytest.approx(0.4, abs=1e-8)
    assert bd_rate(line, above, method) == pytest.approx(100 * (10 ** (-0.4 / 8) - 1), abs=1e-8)


def test_published_values():
    """JCTVC-E137's data with the BD-rate that VMAF's tests expect of it (piecewise cubic Hermite)."""
    anchor = [(108048.8736, 43.6471), (61279.976, 40.3953), (33905.6656, 37.247), (18883.6928, 34.2911)]
    test = [(108061.2784, 43.6768), (61299.9936, 40.4232), (33928.7472, 37.2761), (18910.912, 34.3147)]
    assert bd_rate(anchor, test, "pchip") == pytest.approx(-0.465215420752807, abs=1e-9)


def test_example_of_the_package_integrated_on_a_grid():
    """libx265's presets, the example in bjontegaard's README; the integral by the trapezoidal rule instead of by parts."""
    anchor = np.array([(1358.24, 34.851), (2486.44, 36.845), (4593.60, 38.615), (9487.76, 40.037)])
    test = np.array([(1356.24, 34.987), (2451.52, 36.970), (4469.00, 38.651), (9787.80, 40.121)])
    grid = np.linspace(34.987, 40.037, 20001)
    log_rates = [PchipInterpolator(c[:, 1], np.log10(c[:, 0]))(grid) for c in (anchor, test)]
    expected = 100 * (10 ** np.mean(log_rates[1] - log_rates[0]) - 1)
    assert bd_rate(anchor, test) == pytest.approx(expected, abs=1e-3)
    assert bd_rate(anchor, test, "akima") == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(
    "test, method, message",
    [
        (CURVE + [0, 20], "pchip", "no quality in common: Adam 27.10 to 35.30 dB, SOAP 47.10 to 55.30 dB"),
        (CURVE[:1], "pchip", "SOAP has 1 point, pchip needs 2"),
        (CURVE[:3], "cubic", "SOAP has 3 points, cubic needs 4"),
        (CURVE[:0], "akima", "SOAP has 0 points, akima needs 2"),
        (CURVE * [[1, 1], [1, 1], [1, 0.9], [1, 1]], "pchip",
         "SOAP is not monotonic: 29.60 dB at 0.250 bpp, then 28.98 dB at 0.480 bpp"),
        (CURVE[[0, 1, 1, 2]], "pchip", "SOAP is not monotonic"),
        (CURVE * [[1, 1], [1, 1], [1, math.nan], [1, 1]], "pchip", "SOAP has a point that is not finite"),
        (CURVE * [[0, 1], [1, 1], [1, 1], [1, 1]], "pchip", "a rate of 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said(test, method, message):
    with pytest.raises(NoComparison, match=message):
        bd_rate(CURVE, test, method, ("Adam", "SOAP"))


def test_no_rate_in_common():
    with pytest.raises(NoComparison, match=r"no rate in common: the anchor 0.120 to 0.950 bpp, .* 1.200 to 9.500 bpp"):
        bd_psnr(CURVE, CURVE * [10, 1])


def test_arguments_of_a_wrong_kind():
    with pytest.raises(ValueError, match="method 'linear': choose from pchip, akima, cubic"):
        bd_rate(CURVE, CURVE, "linear")
    with pytest.raises(ValueError, match=r"the anchor has to be \[P, 2\], .* not \[4\]"):
        bd_rate(CURVE[:, 0], CURVE)


def test_two_or_three_points_with_a_warning():
    """Between two points the curve is a straight line in log rate: the mean distance can be worked out."""
    for points in (CURVE[:2], CURVE[:3]):
        delta = bootstrap_delta(made("Adam", points), made("SOAP", points * [0.8, 1]), resamples=50)
        assert delta.value == pytest.approx(-20, abs=1e-8)
        assert f"SOAP has {len(points)} points only, 4 are usual" in delta.notes


# ---- bootstrap ----


def made(label: str, points, images: int = 5, seeds=("0",), noise: float = 0.0, codec: bool = False, rng=None) -> Curve:
    """A curve whose images have rates and qualities of their own around the points; `noise` is each seed's, in dB."""
    rng = rng or np.random.default_rng(1)
    rates, levels = np.exp(rng.normal(0, 0.5, images)), rng.normal(0, 3, images)
    result = []
    for k, (rate, level) in enumerate(points):
        runs = {}
        for s in seeds:
            shift = noise * rng.normal()
            runs[s] = [
                {"bpp": rate * r / rates.mean(), "psnr-rgb": level + q - levels.mean() + shift, "ms-ssim-rgb": 0.8 + 0.04 * k}
                for r, q in zip(rates, levels)
            ]
        result.append(Point(f"lambda {k}", runs))
    return Curve(label, result, codec=codec)


def test_pairing_takes_out_what_images_have_in_common():
    """Images differ by 3 dB and by 50 % in rate, the curves by exactly 10 %: a paired interval has no width."""
    anchor, test = made("Adam", CURVE), made("SOAP", CURVE * [0.9, 1])
    delta = bootstrap_delta(anchor, test, resamples=200)
    assert (delta.value, delta.low, delta.high) == pytest.approx((-10, -10, -10), abs=1e-8)
    assert delta.resamples == 200 and delta.notes == [] and delta.overlap == pytest.approx(1)


def test_interval_of_the_mean_over_images():
    """Curves that differ in quality by d_i of image i, at all rates: BD-PSNR of a resample is the mean of its d_i, whose
    standard deviation over all resamples is std(d) / sqrt(I)."""
    shifts = np.array([0.1, 0.9, -0.3, 0.4, 0.2, 1.3, 0.5, -0.6])
    anchor, test = (made(label, CURVE, images=len(shifts)) for label in ("Adam", "SOAP"))
    for curve in (anchor, test):
        for point in curve.points:
            for results in point.runs.values():
                for k, result in enumerate(results):  # the same rate for all, so that d_i alone varies
                    result["bpp"] = np.mean([r["bpp"] for r in results]) if k == 0 else results[0]["bpp"]
                    result["psnr-rgb"] += shifts[k] if curve is test else 0
    delta = bootstrap_delta(anchor, test, bd_psnr, resamples=500)
    assert delta.value == pytest.approx(shifts.mean(), abs=1e-6)
    deviation = shifts.std() / math.sqrt(len(shifts))
    assert (delta.high - delta.low) / 2 == pytest.approx(1.96 * deviation, rel=0.1)  # a mean of 8 is nearly normal
    assert bootstrap_delta(anchor, test, bd_psnr, resamples=200, confidence=0.5).low > delta.low + 0.5 * deviation
    several = [bootstrap_delta(anchor, test, bd_psnr, resamples=100, seed=seed).low for seed in (0, 0, 1)]
    assert several[0] == several[1] != several[2]


def test_seeds_are_resampled_with_the_variance_of_their_mean():
    """Two seeds whose curves lie 1 dB apart: the mean over seeds has a standard error of s / sqrt(2) = 0.5 dB."""
    anchor, test = made("Adam", CURVE, seeds=("",)), made("SOAP", CURVE, seeds=("0", "1"))
    for point in test.points:
        for result in point.runs["1"]:
            result["psnr-rgb"] += 1
    (points,), varies = lic_rd.resampled_points([test], "psnr", 4000, np.random.default_rng(0))
    below = made("", CURVE).mean_points("psnr")
    (only_images,), _ = lic_rd.resampled_points([anchor], "psnr", 4000, np.random.default_rng(0))
    assert varies and points.shape == (4000, 4, 2)
    shift = (points - only_images)[..., 1]  # the same images were drawn first
    assert np.ptp(shift, axis=1).max() < 1e-9  # all points have the same seeds, and get the same
    assert shift[:, 0].std() == pytest.approx(0.5, rel=0.02) and shift.mean() == pytest.approx(0.5, abs=0.03)
    assert np.allclose(test.mean_points("psnr"), below + [0, 0.5])


def test_runs_with_the_same_seeds_are_paired():
    """A seed moves both curves alike: nothing of it is left in their difference, but all of it when they are not paired."""
    both = [made(label, CURVE * [scale, 1], seeds=("0", "1", "2")) for label, scale in (("Adam", 1), ("SOAP", 0.9))]
    for curve in both:
        for point in curve.points:
            for s, results in point.runs.items():
                for result in results:
                    result["psnr-rgb"] += 0.3 * int(s)
    paired = bootstrap_delta(*both, resamples=200)
    assert paired.high - paired.low < 1e-8
    for point in both[1].points:
        point.runs = {f"other {s}": results for s, results in point.runs.items()}
    assert bootstrap_delta(*both, resamples=200).high - paired.high > 1


def test_no_interval_where_nothing_can_be_resampled_or_compared():
    one = bootstrap_delta(made("Adam", CURVE, images=1), made("SOAP", CURVE * [0.9, 1], images=1), resamples=20)
    assert one.value == pytest.approx(-10) and math.isnan(one.low) and "no interval: one image and one run" in one.notes
    rough = made("SOAP", CURVE, seeds=("0", "1"))
    for result in rough.points[1].runs["1"]:
        result["psnr-rgb"] += 4  # this seed's curve falls between its second and third point; the mean does not
    delta = bootstrap_delta(made("Adam", CURVE), rough, resamples=100)
    assert math.isfinite(delta.value) and math.isnan(delta.low)
    assert any("of 100 resamples give no rising curves" in note for note in delta.notes)


def test_a_small_overlap_is_said():
    delta = bootstrap_delta(made("Adam", CURVE), made("SOAP", CURVE + [0, 7]), resamples=20)
    assert delta.overlap == pytest.approx(1.2 / 8.2)
    assert "the curves share only 15 % of the quality range of the shorter one" in delta.notes


def test_curves_of_different_images_are_refused():
    with pytest.raises(ValueError, match=r"different numbers of images cannot be paired: \[5, 6\]"):
        bootstrap_delta(made("Adam", CURVE), made("SOAP", CURVE, images=6))


def test_ms_ssim_is_converted_after_the_mean():
    curve = made("Adam", CURVE, images=2)
    for result, value in zip(curve.points[0].runs["0"], (0.9, 0.99)):
        result["ms-ssim-rgb"] = value
    assert curve.mean_points("ms-ssim")[0, 1] == pytest.approx(-10 * math.log10(1 - 0.945))
    assert lic_evaluation.ms_ssim_db(0.945) == pytest.approx(curve.mean_points("ms-ssim")[0, 1])
    for point in curve.points:
        del point.runs["0"][1]["ms-ssim-rgb"]  # a small image
    assert curve.images("ms-ssim") == 1 and curve.mean_points("ms-ssim")[0, 1] == pytest.approx(10)


# ---- tables, plot ----


def test_tables():
    curves = [
        made("Adam", CURVE, seeds=("0", "1"), noise=0.1),
        made("SOAP", CURVE[:3] * [0.9, 1]),
        made("JPEG", CURVE, codec=True),
    ]
    comparisons = lic_rd.compare(curves, "Adam", ["psnr"], resamples=50)
    assert [(c.test, c.anchor) for c in comparisons] == [("SOAP", "Adam"), ("Adam", "JPEG"), ("SOAP", "JPEG")]
    table = lic_rd.bd_table(comparisons)
    lines = table.splitlines()
    assert len({len(line) for line in lines[:5]}) == 1  # aligned
    assert f" {lic_rd.describe_delta(comparisons[2].rate['psnr'], '%')} |" in lines[4] and "SOAP against JPEG" in lines[4]
    assert lic_rd.describe_delta(lic_rd.Delta(-4.214, -5, -3.4), "%") == "-4.21 % [-5.00, -3.40]"
    assert [lic_rd.describe_delta(lic_rd.Delta(value), "dB") for value in (0.5, math.nan)] == ["+0.50 dB", "-"]
    assert lines[-1] == "- PSNR: SOAP has 3 points only, 4 are usual (SOAP against Adam; SOAP against JPEG)"
    points = lic_rd.points_table(curves).splitlines()
    assert len(points) == 2 + 4 + 3 + 4 and "±" in points[2] and "±" not in points[-1]


def test_plot(tmp_path):
    curves = [made("Adam", CURVE, seeds=("0", "1"), noise=0.1), made("SOAP", CURVE * [0.9, 1]), made("mine", CURVE + [0, 1])]
    curves[0].optimizer, curves[1].optimizer = "adam", "soap"
    plot_rd(tmp_path / "rd.png", [*curves, made("JPEG", CURVE - [0, 1], codec=True)], {"SOAP": "BD-rate -10 % against Adam"})
    with Image.open(tmp_path / "rd.png") as picture:
        counts = {colour: count for count, colour in picture.convert("RGB").getcolors(1 << 20)}
        assert picture.width > 1500
    for colour in ("#2166ac", "#c1440e", "#7b3294", "#666666"):  # Adam's, SOAP's, another's, a codec's
        assert counts.get(tuple(bytes.fromhex(colour[1:])), 0) > 100, colour
    small = made("Adam", CURVE)
    for point in small.points:
        for result in point.runs["0"]:
            del result["ms-ssim-rgb"]
    plot_rd(tmp_path / "psnr.png", [small])
    with Image.open(tmp_path / "psnr.png") as picture:
        assert picture.width < 1000  # one axis


# ---- measuring ----


LAYOUT = {"psnr-rgb", "ms-ssim-rgb", "bpp", "encoding_time", "decoding_time"}


def build(seed: int = 0):
    torch.manual_seed(seed)
    return lic_models.build_model("bmshj2018-hyperprior", {"N": 8, "M": 12})


@pytest.fixture(scope="module")
def images(photos):
    return lic_evaluation.image_set([photos / "test"])


@pytest.fixture
def bare(tmp_path) -> Path:
    """A checkpoint as CompressAI's train.py writes it, of random weights: it does not say what model it is."""
    path = tmp_path / "bare" / "checkpoint_best_loss.pth.tar"
    path.parent.mkdir()
    torch.save({"epoch": 3, "state_dict": build().state_dict(), "loss": 1.0}, path)
    return path


@pytest.fixture(scope="module")
def checkpoints(photos, tmp_path_factory) -> list[Path]:
    """Four lambdas with two optimizers, and another seed of one of them, some steps each."""
    root = tmp_path_factory.mktemp("runs")
    tasks = [(name, lmbda, "0") for name in ("soap", "adam") for lmbda in LAMBDAS] + [("adam", LAMBDAS[0], "1")]
    for name, lmbda, seed in tasks:
        arguments = [
            "--N",
            "8",
            "--M",
            "12",
            "--batch-size",
            "2",
            "--eval-crop",
            "64",
            "64",
            "--steps",
            "3",
            "--seed",
            seed,
            "--bitstreams",
            "none",
        ]
        arguments += [
            "--optimizer",
            name,
            "--lambda",
            lmbda,
            "--dataset",
            str(photos),
            "--save",
            str(root / f"{name}{lmbda}-{seed}"),
        ]
        assert train_lic.main(arguments) == 0
    return sorted(root.glob("*/checkpoint.pth.tar"))


def test_a_curve_of_unlike_training_is_told_of():
    """Seeds that are none: one was trained longer, and faster."""

    def checkpoint(seed: str, step: int, **training) -> evaluate_lic.Checkpoint:
        about = {"architecture": "a", "optimizer": "adam", "widths": {}, "metric": "mse", "lmbda": 0.01, "stored": Path("x")}
        return evaluate_lic.Checkpoint(path=Path(seed), seed=seed, step=step, training=training, **about)

    first = checkpoint("0", 6, learning_rate=1e-3, betas=(0.9, 0.95))
    assert evaluate_lic.unlike([first, checkpoint("1", 6, learning_rate=1e-3, betas=[0.9, 0.95]), checkpoint("2", 6)]) == ""
    other = checkpoint("1", 30, learning_rate=1e-2, betas=[0.9, 0.95])
    assert evaluate_lic.unlike([first, other]) == "steps 6, 30; learning_rate 0.001, 0.01"


def command(folder: Path, photos: Path, *arguments) -> list[str]:
    return [*map(str, arguments), "--images", str(photos / "test"), "--save", str(folder), "--resamples", "20"]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "per_image.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("bitstreams", [True, False])
def test_rate_distortion(images, bitstreams):
    """As a study calls it: one dictionary per image; both rates and qualities agree with what the parts measure."""
    model = build().eval()
    model.update(force=True)
    whole = [lic_data.centre_crop(lic_data.read_image(file), (170, 200)) for file in images.files]
    results = lic_evaluation.rate_distortion(model, whole, bitstreams)
    assert len(results) == 2
    for image, result in zip(whole, results):
        estimate, x_hat = lic_evaluation.estimate_image(model, image)
        assert x_hat.shape == image.shape
        assert result["psnr-rgb"] == pytest.approx(lic_evaluation.psnr(lic_evaluation.to_float(image), x_hat), abs=1e-4)
        assert result["bpp-estimated"] == estimate["bpp"] and 0 < result["ms-ssim-rgb"] < 1
        assert result["bpp"] == pytest.approx(
            estimate["bpp"], rel=0 if not bitstreams else 0.1, abs=2 * 64 / (170 * 200) * bitstreams
        )
        assert ("encoding_time" in result) == bitstreams


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_codecs(images, codec):
    image = lic_data.read_image(images.files[0])
    results = [lic_evaluation.code_with(codec, quality, image) for quality in (10, 50, 90)]
    for key in ("bpp", "psnr-rgb", "ms-ssim-rgb"):
        assert results[0][key] < results[1][key] < results[2][key], key
    if codec == "jpeg":
        decoded, bpp = lic_evaluation.jpeg_at(image, results[1]["bpp"])
        assert bpp == results[1]["bpp"]
        assert lic_evaluation.psnr(lic_evaluation.to_float(image), decoded) == pytest.approx(results[1]["psnr-rgb"])


def test_image_sets(photos, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name, value in (("same.png", 1), (f"only-{folder}.png", 2)):
            Image.new("RGB", (70, 80), (value, 0, 0)).save(tmp_path / folder / name)
    both = lic_evaluation.image_set([tmp_path / "a", tmp_path / "b", tmp_path / "a" / "same.png"])
    assert len(both) == 4 and len(set(both.names)) == 4 and {"only-a", "only-b"} < set(both.names)
    assert lic_evaluation.image_set([tmp_path / "a"]).digest != both.digest
    before = both.digest
    Image.new("RGB", (70, 80), (3, 0, 0)).save(tmp_path / "b" / "only-b.png")
    assert lic_evaluation.image_set([tmp_path / "a", tmp_path / "b"]).digest != before
    for name in ("broken.png", "other.jpg"):
        (tmp_path / "a" / name).write_bytes(b"no image")
    with pytest.raises(lic_data.InputError, match="cannot read .*broken.png as an image: .*; cannot read .*other.jpg"):
        lic_evaluation.image_set([tmp_path / "a"])


def test_measurements_survive_an_interruption(images, tmp_path):
    """The second image fails: the first is kept, and is not measured again."""
    seen, path = [], tmp_path / "stored.json"

    def measure(image):
        seen.append(image.shape)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return {"bpp": float(len(seen))}

    with pytest.raises(KeyboardInterrupt):
        lic_evaluation.measure_stored(path, {}, images, lambda: measure)
    results = lic_evaluation.measure_stored(path, {}, images, lambda: measure)
    assert [r["bpp"] for r in results] == [1, 3] and len(seen) == 3
    assert lic_evaluation.measure_stored(path, {}, images, lambda: pytest.fail("measured again")) == results
    assert [file.name for file in tmp_path.iterdir()] == ["stored.json"]
    path.write_text("{")  # damaged: measured again
    assert len(lic_evaluation.measure_stored(path, {}, images, lambda: measure)) == 2 and len(seen) == 5


# ---- the command ----


@pytest.mark.slow
def test_a_checkpoint_of_compressai(bare, photos, tmp_path, capsys):
    folder = tmp_path / "out"
    arguments = command(folder, photos, bare, "--no-bitstreams", "--classic", "-a")
    assert evaluate_lic.main([*arguments[:-6], "bmshj2018-hyperprior", *arguments[-6:]]) == 0
    assert "| bmshj2018-hyperprior |" in capsys.readouterr().out
    layout = json.loads((folder / "eval-bmshj2018-hyperprior.json").read_text())
    assert layout["description"] == "Inference (entropy-estimation)" and layout["results"].keys() == LAYOUT - {
        "encoding_time",
        "decoding_time",
    }
    torch.save({"state_dict": build(1).state_dict()}, bare)  # other bytes at the same path are measured anew
    before = layout["results"]["psnr-rgb"]
    assert evaluate_lic.main([*arguments[:-6], "bmshj2018-hyperprior", *arguments[-6:]]) == 0
    assert json.loads((folder / "eval-bmshj2018-hyperprior.json").read_text())["results"]["psnr-rgb"] != before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to evaluate: give checkpoints, or --curve"),
        (["BARE"], "does not say which model it holds"),
        (["BARE", "-a", "hyperprior"], "--architecture hyperprior: choose from bmshj2018-factorized, "),
        (["BARE", "-a", "mbt2018"], "does not hold a mbt2018"),
        (["MISSING"], "cannot read the checkpoint"),
        (["PHOTO"], "cannot read the checkpoint"),
        (["BARE", "--images", "MISSING"], "does not exist"),
        (["BARE", "--images", "EMPTY"], "no images below it"),
        (["--curve", "BARE"], "give LABEL=CHECKPOINT,CHECKPOINT,.."),
        (["--curve", "A=BARE", "--curve", "A=BARE"], "--curve A: given twice"),
        (["--curve", "A=EMPTY/*.tar"], "--curve A: no file matches"),
        (["--curve", "JPEG=BARE", "-a", "bmshj2018-hyperprior"], "--curve JPEG: that is a codec's label"),
        (["--curve", "A=BARE,BARE", "-a", "bmshj2018-hyperprior"], "are both A, "),
        (["BARE", "-a", "bmshj2018-hyperprior", "--anchor", "B"], "--anchor B: the curves are bmshj2018-hyperprior, JPEG"),
        (["BARE", "--confidence", "95"], "--confidence 95 is not between 0 and 1"),
        (["BARE", "--device", "tpu"], "--device tpu"),
        (["BARE", "--save", "PHOTO"], "--save "),
        (["NAN", "-a", "bmshj2018-hyperprior"], "cannot be evaluated: g_a.0.weight is not finite"),
    ],
)  # fmt: skip
def test_errors_are_one_line(arguments, message, bare, photos, tmp_path, capsys):
    state = build().state_dict()
    state["g_a.0.weight"][0, 0] = math.nan
    torch.save(state, tmp_path / "nan.pth")
    (tmp_path / "empty").mkdir()
    names = {"BARE": bare, "MISSING": tmp_path / "missing", "EMPTY": tmp_path / "empty", "NAN": tmp_path / "nan.pth",
             "PHOTO": lic_data.find_images(photos / "test")[0]}  # fmt: skip
    given = arguments
    for name, path in names.items():
        given = [argument.replace(name, str(path)) for argument in given]
    defaults = {"--images": photos / "test", "--save": tmp_path / "out"}
    for option, value in defaults.items():
        given += [] if option in given else [option, str(value)]
    with pytest.raises(SystemExit) as stopped:
        evaluate_lic.main(given)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate_lic.py: error: ") and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_curves_of_trained_models(checkpoints, photos, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    capsys.readouterr()
    assert evaluate_lic.main(command(folder, photos, *checkpoints)) == 0
    captured = capsys.readouterr()
    assert (folder / "results.md").read_text(encoding="utf-8").strip() in captured.out and "Traceback" not in captured.err
    assert "| SOAP against Adam " in captured.out and "| Adam against WebP " in captured.out

    summary = json.loads((folder / "summary.json").read_text())
    curves = {curve["label"]: curve for curve in summary["curves"]}
    assert list(curves) == ["Adam", "SOAP", "JPEG", "WebP"] and summary["anchor"] == "Adam"
    assert [point["runs"] for point in curves["SOAP"]["points"]] == [1] * 4
    assert sorted(point["runs"] for point in curves["Adam"]["points"]) == [1, 1, 1, 2]
    table = rows(folder)
    assert len(table) == 2 * (9 + 2 * len(lic_evaluation.CODEC_QUALITIES))
    for name, label in (("adam", "Adam"), ("soap", "SOAP"), ("jpeg", "JPEG"), ("webp", "WebP")):
        results = json.loads((folder / f"eval-{name}.json").read_text())["results"]
        assert results.keys() == LAYOUT and results["bpp"] == sorted(results["bpp"])
        for k, point in enumerate(curves[label]["points"]):
            values = [float(row["psnr"]) for row in table if (row["curve"], row["setting"]) == (label, point["setting"])]
            assert results["psnr-rgb"][k] == pytest.approx(np.mean(values)) == pytest.approx(point["psnr-rgb"])

    # CompressAI's own tools: its plot reads the curves, its evaluation of a checkpoint has the same numbers
    files = [str(folder / f"eval-{name}.json") for name in ("adam", "soap", "jpeg", "webp")]
    for metric in ("psnr", "ms-ssim"):
        compressai_plot.main(["-f", *files, "-m", metric, "-o", str(tmp_path / f"{metric}.png")])
        assert (tmp_path / f"{metric}.png").stat().st_size > 10_000
    one = next(path for path in checkpoints if "soap0.013" in str(path))
    eval_model.main(["checkpoint", str(photos / "test"), "-a", "bmshj2018-hyperprior", "-p", str(one), "-d", str(tmp_path),
                     "-o", "theirs.json"])  # fmt: skip
    theirs = json.loads((tmp_path / "theirs.json").read_text())["results"]
    ours = next(point for point in curves["SOAP"]["points"] if point["setting"] == "lambda 0.013")
    assert theirs["bpp"][0] == pytest.approx(ours["bpp"], rel=1e-6)
    assert theirs["psnr-rgb"][0] == pytest.approx(ours["psnr-rgb"], abs=1e-3)

    # Nothing is measured twice, also under other labels
    for name in ("code_image", "estimate_image"):
        monkeypatch.setattr(evaluate_lic, name, lambda *_: pytest.fail("measured again"))
    groups = [
        f"--curve={label}={checkpoints[0].parent.parent}/{name}0*-0/checkpoint.pth.tar"
        for label, name in (("A", "adam"), ("B", "soap"))
    ]
    assert evaluate_lic.main(command(folder, photos, *groups, "--anchor", "B", "--method", "akima")) == 0
    assert "| A against B " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate_lic.main(command(folder, photos, *checkpoints, f"--curve=X={checkpoints[0]},{checkpoints[0]}"))
    assert "are both X, lambda 0.0035, seed 0" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_started_again(checkpoints, photos, tmp_path, examples):
    folder = tmp_path / "out"
    arguments = [
        sys.executable,
        str(examples / "evaluate_lic.py"),
        *command(folder, photos, *checkpoints[:3], "--classic", "jpeg"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(folder.glob("cache/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; the same command goes on from here" in error
    kept = {
        file: file.stat().st_mtime_ns
        for file in folder.glob("cache/*.json")
        if len(json.loads(file.read_text())["results"]) == 2
    }
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    assert (folder / "rd.png").exists() and not list(folder.glob("cache/*.tmp"))
