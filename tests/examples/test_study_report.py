"""examples/lic_report.py: what a study's report says of data whose answers are known."""

import re
import warnings
from pathlib import Path

import lic_report
import pytest
from lic_files import InputError, write_table
from lic_study import Study
from matplotlib.figure import Figure
from small_study import finish, make_study, table


@pytest.fixture
def known(tmp_path) -> tuple[Study, Path]:
    """Data in which SOAP reaches Adam's loss at a tenth of the length with seed 0 and at the whole with seed 1, takes 1.5 times
    Adam's time a step, saves 10 % of the rate, and loses less by quantisation."""
    study = make_study(tmp_path)
    for _ in range(2):
        finish(study, lambda run: run.rate if "rates" in run.experiments and len(run.experiments) == 1 else 1.0)
    data = tmp_path / "data"
    runs = []
    rd, quantization, conflicts, outliers = [], [], [], []
    for run in study.runs(study.results())[0]:
        loss = {("Adam", 1.0): 4.0, ("Adam", 0.1): 6.0, ("SOAP", 1.0): 3.0, ("SOAP", 0.1): 3.9 + 0.2 * run.seed}
        runs.append(
            {"run": run.name, "optimizer": run.label, "model": run.model, "variant": run.variant, "seed": run.seed,
             "experiments": " ".join(run.experiments), "learning_rate": run.rate, "steps": run.steps, "fraction": run.fraction,
             "lambda": run.lmbda, "failed": False, "loss": loss[run.label, run.fraction], "bpp": 0.5, "psnr": 27.0}
        )  # fmt: skip
        soap = run.label == "SOAP"
        if "curves" in run.experiments:
            for image in range(3):
                level = 27 + 100 * run.lmbda + image
                point = {"image": str(image), "bpp": 0.2 * 1.5 ** (100 * run.lmbda) * (0.9 if soap else 1), "psnr-rgb": level}
                rd.append({"run": run.name, **point})
                for setting, worse in (("float", 1.0), ("8/8 nearest mse", 1.05 if soap else 1.2)):
                    row = {"run": run.name, "setting": setting, **point}
                    quantization.append(row | {"bpp": point["bpp"] * worse})
            for layer, scale in (("g_a.0", 1), ("g_a.6", 2), ("y", 2), ("z", 3)):  # g_a.6 gives out y, which counts once
                low = {"kurtosis_channels": 1.5 * scale, "kurtosis": 4.0, "max_over_median": 9.0, "beyond_6_sigma": 0.0}
                outliers.append({"run": run.name, "layer": layer, **{k: v if soap else 2 * v for k, v in low.items()}})
        if "horizons" in run.experiments and run.fraction == 1.0:
            for step in range(10, 101, 10):
                value = 0.1 if soap else -0.3
                row = {"raw": 0, "raw_shared": -0.5, "preconditioned": 0, "preconditioned_shared": value}
                conflicts.append({"run": run.name, "step": step, **row, "between_steps": 0.9 if soap else 0.95})
    data.mkdir()
    speed = [
        {
            "processor": "X",
            "threads": 1,
            "model": "bmshj2018-hyperprior",
            "optimizer": label,
            "round": turn,
            "seconds_per_step": (turn + 1) * s,
        }
        for label, s in (("Adam", 0.1), ("SOAP", 0.15))
        for turn in range(3)
    ]
    tables = {
        "runs": runs,
        "rd": rd,
        "quantization": quantization,
        "conflicts": conflicts,
        "outliers": outliers,
        "speed": speed,
    }
    for name, rows in tables.items():
        write_table(data / f"{name}.csv", rows)
    return study, data


@pytest.mark.slow
def test_the_report_answers_what_is_known(known, tmp_path, capsys):
    study, data = known
    lic_report.write_report(study, data, tmp_path / "report")
    claims = {claim["claim"]: claim for claim in lic_report.summary(tmp_path / "report")["claims"]}
    steps = claims["steps to Adam's final evaluation loss"]
    assert steps["measured"] == "100 % (10, 100 % by seed)" and not steps["holds"]
    assert claims["time to the same, optimizer included"]["measured"] == "150 %"
    rate = claims["BD-rate against Adam at equal steps"]
    assert rate["measured"].startswith("-10.0 % [-10.0, -10.0]") and rate["holds"]
    within = claims["alignment of updates within a step"]
    assert within["measured"] == "in 100 % of measurements; mean +0.100 against -0.300" and within["holds"]
    assert not claims["alignment of updates of two steps"]["holds"]
    assert (
        claims["outliers"]["holds"] and "of 3 layers and latents; latents lower in all three" in claims["outliers"]["measured"]
    )
    loss = claims["BD-rate loss by quantisation"]
    assert loss["measured"] == "8/8 nearest mse: +5.0 % against +20.0 %" and loss["holds"]

    page = (tmp_path / "report" / "report.html").read_text()
    assert 'src="data:image/png;base64,' in page and '<img src="steps.png' not in page  # one file, with everything in it
    text = (tmp_path / "report" / "report.md").read_text()
    for picture in ("rates.png", "steps.png", "rd.png", "conflicts.png", "outliers.png", "quantization.png"):
        assert f"({picture})" in text and (tmp_path / "report" / picture).stat().st_size > 5000
    assert "weight-decay=0" in text


def test_a_report_of_the_first_runs_alone(known, tmp_path):
    """Nothing but a grid: no claim, and no error."""
    study, data = known
    runs = [row for row in table(data / "runs.csv") if row["experiments"] == "rates"]
    write_table(tmp_path / "first" / "runs.csv", runs) if (tmp_path / "first").mkdir() is None else None
    lic_report.write_report(study, tmp_path / "first", tmp_path / "report")
    assert lic_report.summary(tmp_path / "report")["claims"] == []


def changed(known, tmp_path, **change) -> tuple[dict[str, dict], str]:
    """The claims and the text of a report from the known data with some tables changed: name -> function of its rows."""
    study, data = known
    for name, function in change.items():
        rows = table(data / f"{name}.csv")
        write_table(data / f"{name}.csv", function(rows))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())  # which takes most of the time
        warnings.simplefilter("error", RuntimeWarning)
        lic_report.write_report(study, data, tmp_path / "report")
    claims = lic_report.summary(tmp_path / "report")["claims"]
    return {claim["claim"]: claim for claim in claims}, (tmp_path / "report" / "report.md").read_text()


STEPS, BETWEEN, LOSS = (
    "steps to Adam's final evaluation loss",
    "alignment of updates of two steps",
    "BD-rate loss by quantisation",
)


def test_models_that_quantisation_ruins_are_no_small_loss(known, tmp_path):
    """Their points are no curve any more: no BD-rate, which must not leave the setting out of the claim."""

    def ruin(rows):
        six = [row | {"setting": "6/6 nearest mse"} for row in rows if row["setting"] != "float"]
        return rows + [row | {"psnr-rgb": 20 - float(row["bpp"])} if "-soap-" in row["run"] else row for row in six]

    claims, _ = changed(known, tmp_path, quantization=ruin)
    assert "6/6 nearest mse: none against +20.0 %" in claims[LOSS]["measured"] and claims[LOSS]["holds"] is False


def test_claims_are_open_while_runs_are_missing(known, tmp_path):
    def without(rows):
        return [row for row in rows if (row["optimizer"], row["fraction"], row["seed"]) != ("Adam", "1", "1")]

    few = {"runs": without, "quantization": lambda rows: [r for r in rows if "l0.02-" not in r["run"]]}
    claims, text = changed(known, tmp_path, **few)
    assert re.search(r"^\d+ runs\. Not made yet: .*1 of horizons", text, re.M)
    assert claims[STEPS]["measured"] == "10 % (10 % by seed) (so far; runs missing: 1)" and claims[STEPS]["holds"] is None


def test_momentum_is_not_taken_for_alignment(known, tmp_path):
    def higher(rows):
        return [row | {"between_steps": 0.97} if "-soap-" in row["run"] else row for row in rows]

    claims, _ = changed(known, tmp_path, conflicts=higher)
    assert claims[BETWEEN]["measured"].endswith("but momentum is 0.95 against 0.9") and claims[BETWEEN]["holds"] is None

    # An Adam of SOAP's momentum, in the comparisons beside it, says what is left of that: nothing.
    study, data = known
    study.optimizers["Adam 0.95"] = {"optimizer": "adam", "betas": [0.95, 0.95]}
    soap = next(row for row in table(data / "runs.csv") if "-soap-" in row["run"] and row["fraction"] == "0.1")

    def beside(rows):
        mine = [{"run": run, "optimizer": label} for run, label in (("x", "Adam 0.95"), (soap["run"], "SOAP"))]
        return [row for row in rows if row["run"] != soap["run"]] + [
            soap | {"experiments": "comparisons"} | row for row in mine
        ]

    def aligned(rows):
        like = next(row for row in rows if "-soap-" in row["run"])
        return rows + [like | {"run": run, "between_steps": value} for run, value in (("x", 0.98), (soap["run"], 0.97))]

    claims, text = changed(known, tmp_path, runs=beside, conflicts=aligned)
    expected = "but momentum is 0.95 against 0.9; in 0 % of measurements; mean +0.970 against +0.980 with Adam 0.95, 10 steps"
    assert claims[BETWEEN]["measured"].endswith(expected) and claims[BETWEEN]["holds"] is False
    assert "Of runs of 10 steps:" in text
    del study.optimizers["Adam 0.95"]
    write_table(data / "runs.csv", [row for row in table(data / "runs.csv") if row["run"] != "x"])

    known[0].optimizers["Adam"]["betas"] = [0.95, 0.999]
    claims, _ = changed(known, tmp_path)
    assert claims[BETWEEN]["holds"] is True


def test_measurements_without_a_value_are_not_counted(known, tmp_path):
    def early(rows):
        return [row | {"preconditioned_shared": "nan"} if int(row["step"]) <= 60 else row for row in rows]

    claims, _ = changed(known, tmp_path, conflicts=early)
    assert claims["alignment of updates within a step"]["measured"].startswith("in 100 % of measurements")


def test_runs_that_failed_are_told_of(known, tmp_path):
    def fail(rows):
        short = [row for row in rows if row["fraction"] == "0.1"]
        return [row | {"failed": "True", "loss": "", "bpp": "", "psnr": ""} if row in short else row for row in rows]

    claims, text = changed(known, tmp_path, runs=fail)
    assert claims[STEPS]["measured"].startswith("100 %")
    assert "2 of 2 failed" in text


def test_a_seed_whose_baseline_failed_has_no_goal(known, tmp_path):
    def fail(rows):
        return [r | {"failed": "True", "loss": ""} if "-adam-lr0.001-100-l0.013-s1" in r["run"] else r for r in rows]

    claims, _ = changed(known, tmp_path, runs=fail)
    assert claims[STEPS]["measured"] == "10 % (10 % by seed)"


def test_time_is_that_of_the_machine_on_which_it_is_longest(known, tmp_path):
    def another(rows):
        return [*rows, *(row | {"processor": "Z", "seconds_per_step": "1"} for row in rows)]

    claims, _ = changed(known, tmp_path, speed=another)
    assert claims["time to the same, optimizer included"]["measured"] == "150 %"  # 100 % on Z


def test_outliers_are_compared_between_like_runs(known, tmp_path):
    """A run of one optimizer alone, with a lambda of its own, changes nothing."""
    study, data = known
    alone = next(row for row in table(data / "runs.csv") if "-soap-" in row["run"] and row["fraction"] == "0.1")

    def more(rows):
        return rows + [rows[0] | {"run": alone["run"], "layer": layer, "kurtosis": 1e6} for layer in ("g_a.0", "y", "z")]

    claims, text = changed(known, tmp_path, outliers=more)
    assert claims["outliers"]["holds"] and "From scratch: means over 2 runs of each optimizer" in text


def test_conflicts_of_grids_are_compared_at_one_length(known, tmp_path):
    """Adam's grid at full length is there before SOAP's: its steps are not SOAP's at the same place of the schedule."""

    def grids(rows):
        chosen = [row for row in table(known[1] / "runs.csv") if "rates" in row["experiments"]]
        return [
            rows[0] | {"run": run["run"], "step": step, "preconditioned_shared": 0.9 if run["fraction"] == "1" else 0.1}
            for run in chosen for step in (10, 20)
        ]  # fmt: skip

    _, text = changed(known, tmp_path, conflicts=grids, runs=lambda rows: [r for r in rows if "rates" in r["experiments"]
                                                                           and "horizons" not in r["experiments"]
                                                                           or r["fraction"] == "0.1"])  # fmt: skip
    assert "Measured on runs of 10 steps." in text and "+0.900 |" not in text.partition("## Conflicts")[2].partition("\n## ")[0]


def test_outliers_of_a_shared_start_are_not_an_optimizers_own(known, tmp_path):
    """They stand in the table beside those from scratch; the claim rests on these."""
    study, data = known
    curves = [row for row in table(data / "runs.csv") if "curves" in row["experiments"]]

    def more(rows):
        return rows + [row | {"run": row["run"] + "-from-soap-100", "start": "s"} for row in curves]

    def worse(rows):
        return rows + [row | {"run": row["run"] + "-from-soap-100", "kurtosis": 50} for row in rows]

    claims, text = changed(known, tmp_path, runs=more, outliers=worse)
    assert claims["outliers"]["holds"]
    assert "From scratch: means over 2 runs" in text and "From a shared start: means over 2 runs" in text
    assert [line.split("|")[5].strip() for line in text.splitlines() if "| from a shared start |" in line] == ["50.00"] * 4


def test_quantisation_of_models_from_scratch(known, tmp_path):
    """Their loss before and after: bpp of 0.2 and a level of 27 dB, then 0.3."""
    study, data = known
    ends = [row for row in table(data / "runs.csv") if "horizons" in row["experiments"] and row["fraction"] == "1"]

    def more(rows):
        settings = {"float": 0.2, "8/8 nearest mse": 0.3}
        return rows + [
            {"run": run["run"], "setting": setting, "image": "0", "psnr-rgb": 27, "bpp": bpp + (run["optimizer"] == "SOAP")}
            for run in ends for setting, bpp in settings.items()
        ]  # fmt: skip

    claims, _ = changed(known, tmp_path, quantization=more)
    before = 0.013 * 255**2 * 10**-2.7 + 0.2
    claim = claims["relative loss by quantisation, models from scratch"]
    assert claim["measured"] == f"8/8 nearest mse: {10 / (before + 1):+.1f} % against {10 / before:+.1f} %" and claim["holds"]


def test_bars_of_kurtosis_begin_at_its_least(known, tmp_path, monkeypatch):
    study, data = known
    report = lic_report.Report(study, lic_report.Data(data), tmp_path)
    limits = []
    monkeypatch.setattr(report, "save", lambda figure, *_: limits.extend(axis.get_xlim()[0] for axis in figure.axes))
    lic_report.outliers(report)
    assert limits == [1, 1]


def test_data_of_another_study(known, tmp_path):
    study, data = known
    del study.optimizers["SOAP"]
    with pytest.raises(InputError, match="has runs of SOAP, which .*small.yaml does not: another study's data"):
        lic_report.write_report(study, data, tmp_path / "report")
