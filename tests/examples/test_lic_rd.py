"""examples/lic_rd.py: Bjontegaard deltas against what can be worked out, intervals, tables, the plot."""

import math

import lic_evaluation
import lic_rd
import numpy as np
import pytest
from lic_rd import Curve, NoComparison, Point, bd_psnr, bd_rate, bootstrap_delta
from lic_rd_plot import plot_rd
from PIL import Image
from scipy.interpolate import PchipInterpolator

CURVE = np.array([[0.12, 27.1], [0.25, 29.6], [0.48, 32.2], [0.95, 35.3]])  # bpp, dB


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
