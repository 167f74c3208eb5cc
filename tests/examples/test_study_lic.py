"""examples/study_lic.py: which runs a study asks for, that it goes on where it was killed, and what its report says of data
whose answers are known."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import lic_report
import lic_study
import lic_study_runs
import pytest
import study_lic
from lic_files import InputError, write_json, write_table
from lic_study import Study
from lic_study_runs import check_options, execute, train
from matplotlib.figure import Figure

PLAN = """
title: A small one
steps: 100
evaluations: 4
train: {N: 8, M: 12, batch-size: 2, warmup-steps: 5, eval-crop: [128, 192]}
optimizers:
  Adam: {optimizer: adam}
  SOAP: {optimizer: soap}
baseline: Adam
rates:
  - {fraction: 0.1, seeds: [0, 1], grid: {Adam: [1.0e-3, 2.0e-3], SOAP: [1.0e-3, 4.0e-3]}}
  - {fraction: 1.0, seeds: [0], grid: {Adam: [1.0e-3, 2.0e-3]}}
horizons: {seeds: [0, 1], fractions: [0.1, 1.0], optimizers: [Adam, SOAP]}
curves: {seeds: [0], lambdas: [0.01, 0.02], optimizers: [Adam, SOAP]}
ablations:
  - fraction: 0.1
    seeds: [0]
    optimizers: [SOAP]
    variants: [{weight-decay: 0}, {clip-max-norm: 0, optimizer-args: max_grad_norm=1.0}, {betas: [0.9, 0.95]}, {rate-factor: 3}]
measure:
  outliers: {experiments: [curves]}
  quantization: {experiments: [curves], bits: [8/8]}
"""


def make_study(tmp_path: Path, text: str = PLAN) -> Study:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return Study(path, tmp_path / "study")


def finish(study: Study, losses) -> None:
    """Write the outcome of every run that can be named by now."""
    for run in study.runs(study.results())[0]:
        folder = study.folder_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "finished.json").exists():
            write_json(folder / "finished.json", {"failed": losses(run) is None, "loss": losses(run), "bpp": 0.5, "psnr": 27.0})


# ---- which runs ----


def test_the_runs_of_a_study(tmp_path):
    study = make_study(tmp_path)
    runs, waiting = study.runs({})
    assert len(runs) == 2 * 2 * 2 + 2 and waiting  # the grids; everything else waits for their best rates
    first = next(run for run in runs if run.rate == 1e-3)
    assert first.name == "bmshj2018-hyperprior-adam-lr0.001-10-l0.013-s0"
    command = first.command(tmp_path / "x")
    joined = " ".join(command[2:])
    for part in ("--steps 10", "--learning-rate 0.001", "--eval-every 2", "--N 8", "--eval-crop 128 192", "--optimizer adam"):
        assert part in joined
    assert joined.endswith(f"--save {tmp_path / 'x'}") and "--bitstreams none" in joined

    # Adam: 2e-3 is better over the short length, 1e-3 over the long one. SOAP has a short grid only: it serves both.
    finish(study, lambda run: 5.0 if run.rate == (2e-3 if run.steps == 10 else 1e-3) else 6.0)
    results = study.results()
    assert (study.best_rate("Adam", results, 0.1), study.best_rate("Adam", results, 1.0)) == (2e-3, 1e-3)
    runs, waiting = study.runs(results)
    assert not waiting
    assert len({run.name for run in runs}) == len(runs)
    shared = next(run for run in runs if run.name == "bmshj2018-hyperprior-adam-lr0.002-10-l0.013-s0")
    assert shared.experiments == ["rates", "horizons"]  # made once
    variants = {run.variant for run in runs if "ablations" in run.experiments}
    assert variants == {"", "weight-decay=0", "clip-max-norm=0 optimizer-args=max_grad_norm=1.0", "betas=0.9 0.95"}
    rates = {run.rate for run in runs if "ablations" in run.experiments and not run.variant}
    assert rates == {1e-3, 3e-3}
    lambdas = {(run.label, run.lmbda, run.steps) for run in runs if "curves" in run.experiments}
    assert lambdas == {(label, lmbda, 100) for label in ("Adam", "SOAP") for lmbda in (0.01, 0.02)}


def test_a_rate_that_diverged_is_not_the_best(tmp_path):
    study = make_study(tmp_path)
    finish(study, lambda run: None if run.rate == 2e-3 and run.seed == 1 else run.rate)
    assert study.best_rate("Adam", study.results(), 0.1) == 1e-3


STARTED = PLAN.replace("curves: {", "curves: {fraction: 0.5, start: {optimizer: SOAP}, ").replace(
    "horizons:",
    "  - {fraction: 0.5, start: {optimizer: SOAP}, lambda: 0.02, seeds: [0], grid: {Adam: [3.0e-4, 5.0e-4], SOAP: [5.0e-4]}}"
    "\nhorizons:",
)


def test_runs_that_go_on_from_one_model(tmp_path):
    """The curves begin from the model that SOAP ends with at full length, the same of each seed for all; they have a grid of
    their own, which does not tell the others' learning rates."""
    study = make_study(tmp_path, STARTED)
    runs, waiting = study.runs({})
    assert not any(run.start for run in runs) and waiting.count(("rates", "Adam")) == 2 and ("curves", "SOAP") in waiting
    for _ in range(3):
        finish(study, lambda run: run.rate)
    results = study.results()
    runs, waiting = study.runs(results)
    assert not waiting
    start = {"optimizer": "SOAP"}
    assert (study.best_rate("Adam", results, 0.5, start), study.best_rate("Adam", results, 0.5)) == (3e-4, 1e-3)
    curves = [run for run in runs if "curves" in run.experiments]
    assert {(run.label, run.rate, run.steps, run.trained) for run in curves} == {
        ("Adam", 3e-4, 50, 1.5),
        ("SOAP", 5e-4, 50, 1.5),
    }
    first = next(run for run in runs if run.name == curves[0].start)
    assert (first.label, first.steps, first.seed, first.start) == ("SOAP", 100, 0, "") and "horizons" in first.experiments
    command = curves[0].command(study.folder_of(curves[0]))
    assert command[command.index("--init") + 1] == str(study.folder_of(first) / lic_study.CHECKPOINT)
    assert curves[0].name.endswith("-l0.02-s0-from-soap-100")
    assert {"0.02"} == {f"{run.lmbda:g}" for run in runs if "rates" in run.experiments and run.start}


def test_a_run_waits_for_what_it_starts_from(tmp_path, monkeypatch):
    """It is not begun before; and never, where that had to stop."""
    study = make_study(tmp_path, STARTED)
    order, said = [], []

    def train(study, run, threads, stop):
        order.append(run)
        failed = run.label == "SOAP" and run.steps == 100 and run.seed == 0 and not fine
        loss = None if failed else run.rate
        write_json(study.folder_of(run) / "finished.json", {"failed": failed, "loss": loss, "bpp": 0.5, "psnr": 27.0})
        return "failed" if failed else "finished"

    monkeypatch.setattr(lic_study_runs, "train", train)
    monkeypatch.setattr(study, "missing", lambda run: [])
    fine = False
    execute(study, 2, 1, "curves", said.append)
    assert order == []  # their learning rates are not known yet
    execute(study, 1, 1, None, said.append)
    assert not any(run.start for run in order)
    assert "cannot be made: bmshj2018-hyperprior-soap-lr0.001-100-l0.013-s0, which they start from, had to stop" in said[-1]
    for path in study.folder.glob("runs/*/finished.json"):
        path.unlink()
    order.clear()
    fine = True
    assert execute(study, 1, 1, None, said.append)
    names = [run.name for run in order]
    assert all(names.index(run.start) < names.index(run.name) for run in order if run.start)
    assert sum(bool(run.start) for run in order) == 3 + 4 - 2  # the grid's and the curves', two of which are both


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("curves: {", "curves: {start: {optimizer: Eve}, ", "curves starts from 'Eve', which is none of Adam, SOAP"),
        ("curves: {", "curves: {start: SOAP, ", "the start of curves should be a mapping of names to values, not 'SOAP'"),
        ("baseline: Adam", "baseline: Eve", "the baseline 'Eve' is none of Adam, SOAP"),
        ("curves:", "curved:", "the study: curved is not one of ablations, "),
        ("N: 8,", "channels: 8,", "train: channels is not an option of train_lic.py"),
        ("weight-decay: 0}", "weight-decy: 0}", "a variant: weight-decy is not an option of train_lic.py"),
        (
            "seeds: [0], lambdas",
            "sedes: [0], lambdas",
            "curves: sedes is not one of fraction, lambdas, optimizers, seeds, start",
        ),
        ("fractions: [0.1, 1.0], ", "", "horizons has no 'fractions'"),
        ("SOAP: [1.0e-3, 4.0e-3]", "SOAP: fast", "rates: grid: SOAP: 'fast' is not a list of numbers above 0"),
        ("SOAP: {optimizer: soap}", "SOAP: {optimizer: soup}", "the optimizer 'SOAP': soup is none of soap, adam"),
        ("steps: 100", "steps: six", "steps: 'six' is not a number of steps"),
        (
            "optimizers:\n  Adam: {optimizer: adam}\n  SOAP: {optimizer: soap}",
            "optimizers: [Adam, SOAP]",
            "optimizers should be a",
        ),
        ("optimizers: [Adam, SOAP]}\ncurves", "optimizers: [Adam, Lion]}\ncurves", "horizons names 'Lion', which is none of"),
        ("steps: 100", "length: 100", "the study has no 'steps'"),
        ("title: A small one", "title: [", "cannot read the study"),
    ],
)
def test_what_a_study_cannot_be(tmp_path, old, new, message):
    assert old in PLAN
    with pytest.raises(InputError) as caught:
        make_study(tmp_path, PLAN.replace(old, new, 1))
    assert message in str(caught.value)


@pytest.mark.parametrize("path", list(lic_study.all_studies()), ids=lambda path: path.stem)
def test_the_studies_that_come_along(path, tmp_path):
    """Every run of every study is a command that train_lic.py understands."""
    study = Study(path, tmp_path)
    for _ in range(3):
        finish(study, lambda run: run.rate)
    runs, waiting = study.runs(study.results())
    assert not waiting and runs
    parser = lic_study.make_parser("")
    for run in runs:
        command = run.command(tmp_path / "x")
        parser.parse_args(command[command.index(str(lic_study.HERE / "train_lic.py")) + 1 :])


def test_errors_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        study_lic.main(["nowhere.yaml", "--save", str(tmp_path)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("study_lic.py: error: cannot read the study nowhere.yaml") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        study_lic.main(["quick", "--save", str(tmp_path / "none"), "--report"])
    assert "holds no finished run yet" in capsys.readouterr().err


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "x.json", [{"a": float("nan"), "b": [float("inf"), 1.0]}])
    assert json.loads((tmp_path / "x.json").read_text()) == [{"a": None, "b": [None, 1.0]}]


# ---- the report ----


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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


# ---- running ----

TINY = """
title: Tiny
steps: 20
evaluations: 2
train: {N: 8, M: 12, batch-size: 2, warmup-steps: 2, eval-crop: [64, 64], conflict-every: 5, save-every: 2}
optimizers:
  Adam: {optimizer: adam}
  SOAP: {optimizer: soap}
baseline: Adam
rates: {fraction: 1.0, seeds: [0], grid: {Adam: [1.0e-3], SOAP: [3.0e-3]}}
horizons: {seeds: [0], fractions: [1.0], optimizers: [Adam, SOAP]}
measure:
  outliers: {experiments: [horizons]}
  bases: {experiments: [horizons]}
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGHUP])  # (SIGTERM takes the same way)
def test_killed_and_gone_on_with(tmp_path, examples, how):
    """A signal in the midst of a run, then two processes at once, which share the rest."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    folder = tmp_path / "study"
    command = [sys.executable, examples / "study_lic.py", path, "--save", folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def begin() -> subprocess.Popen:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait_for(pattern: str, process: subprocess.Popen) -> None:
        while not list(folder.glob(pattern)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)

    process = begin()
    wait_for("runs/*/metrics.csv", process)
    process.send_signal(how)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped before all runs were done; the same command goes on" in stdout, stderr

    both = [begin(), begin()]
    for process in both:
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0 and "Traceback" not in stderr, stderr
    finished = list(folder.glob("runs/*/finished.json"))
    assert len(finished) == 2
    assert len(table(folder / "data" / "evaluations.csv")) == 4
    assert {row["layer"] for row in table(folder / "data" / "outliers.csv")} >= {"y", "z"}
    assert all(float(row["orthogonality"]) < 1e-4 for row in table(folder / "data" / "bases.csv") if row["basis"] == "yes")
    assert (folder / "report" / "report.html").exists()


@pytest.mark.slow
def test_the_quick_study(tmp_path, capsys):
    """What its users run first, as it comes."""
    folder = tmp_path / "quick"
    assert study_lic.main(["quick", "--save", str(folder), "--jobs", "2"]) == 0
    text = (folder / "report" / "report.md").read_text()
    for part in ("## Learning rates", "## Steps and time to a loss", "## Conflicts", "## Outliers", "## Quantisation"):
        assert part in text
    assert len(table(folder / "data" / "runs.csv")) == 9
    assert {row["setting"] for row in table(folder / "data" / "quantization.csv")} == {"float", "8/8 nearest mse"}
    # From the tables alone, without the runs.
    assert study_lic.main(["quick", "--save", str(tmp_path / "nothing"), "--data", str(folder / "data"), "--report"]) == 0


def test_a_stop_ends_a_run_in_training(tmp_path, monkeypatch):
    """The run's process is told once, and what it leaves is no result."""
    study = make_study(tmp_path)
    run = study.runs({})[0][0]
    stop = threading.Event()
    told = tmp_path / "told"
    script = (
        f"import signal, sys, time; signal.signal(15, lambda *_: (open({str(told)!r}, 'w'), sys.exit(143))); time.sleep(30)"
    )
    monkeypatch.setattr(type(run), "command", lambda self, folder: [sys.executable, "-c", script])
    threading.Timer(1.0, stop.set).start()
    assert train(study, run, 1, stop) == "stopped"
    assert told.exists() and run.name not in study.results()


def test_a_run_that_outlived_its_study_is_waited_for(tmp_path, monkeypatch):
    study = make_study(tmp_path)
    run = study.runs({})[0][0]
    refusal = "train_lic.py: error: --save x: another run is writing there; choose another folder"
    monkeypatch.setattr(type(run), "command", lambda self, folder: [sys.executable, "-c", f"import sys; sys.exit({refusal!r})"])
    assert train(study, run, 1, threading.Event()) == "busy"
    monkeypatch.setattr(
        type(run), "command", lambda self, folder: [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    )
    with pytest.raises(InputError, match="no such thing"):
        train(study, run, 1, threading.Event())


def test_a_study_that_was_changed_is_not_taken_for_the_one_before(tmp_path, monkeypatch):
    """A run's name does not hold its batch size."""
    study = make_study(tmp_path)
    run = study.runs({})[0][0]
    monkeypatch.setattr(type(run), "command", lambda self, folder: [sys.executable, "-c", "raise SystemExit('no such thing')"])
    with pytest.raises(InputError, match="no such thing"):
        train(study, run, 1, threading.Event())
    write_json(study.folder_of(run) / "finished.json", {"failed": False, "loss": 1.0, "bpp": 0.5, "psnr": 27.0})
    check_options(make_study(tmp_path), run)  # the same
    changed = make_study(tmp_path, PLAN.replace("batch-size: 2", "batch-size: 4, save-every: 5"))
    assert changed.runs({})[0][0].name == run.name
    with pytest.raises(InputError, match=r"begun with other options \(batch-size 2, now 4\): give the changed study another"):
        execute(changed, 1, 1, None, print)


def test_two_runs_of_one_name_are_refused(tmp_path):
    models = "models: [{model: a.py:Net, optimizers: [SOAP]}, {model: b.py:Net, optimizers: [SOAP]}]\n"
    study = make_study(tmp_path, PLAN + models)
    with pytest.raises(InputError, match="two different runs would be called Net-soap-lr"):
        study.runs({run.name: {"failed": False, "loss": run.rate} for run in study.runs({})[0]})


def test_a_full_disk_is_not_a_run_that_diverged(tmp_path, monkeypatch):
    study = make_study(tmp_path)
    run = study.runs({})[0][0]

    def ends_with(message: str) -> None:
        script = f"import sys; print({message!r}, file=sys.stderr); print('  and how to go on', file=sys.stderr); sys.exit(1)"
        monkeypatch.setattr(type(run), "command", lambda self, folder: [sys.executable, "-c", script])

    ends_with("train_lic.py: stopped: cannot save step 4: No space left on device")
    with pytest.raises(InputError, match="No space left on device"):
        train(study, run, 1, threading.Event())
    assert run.name not in study.results()
    ends_with("train_lic.py: stopped: Adam's loss is nan at step 4")
    assert train(study, run, 1, threading.Event()) == "failed" and study.results()[run.name]["failed"]
    ends_with("train_lic.py: cannot write the results: Read-only file system")  # the log still has what was before
    with pytest.raises(InputError, match="Read-only"):
        train(study, run, 1, threading.Event())


def test_a_part_that_waits_says_for_what(tmp_path, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(PLAN)
    assert study_lic.main([str(path), "--save", str(tmp_path / "study"), "--only", "curves"]) == 130
    out = capsys.readouterr().out
    assert "wait for learning rates that are not known yet: make those first, with --only rates" in out


@pytest.mark.slow
def test_time_before_any_run(tmp_path):
    """What was measured is kept, and there is nothing to report of yet."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    assert study_lic.main([str(path), "--save", str(tmp_path / "study"), "--time"]) == 0
    rows = table(tmp_path / "study" / "data" / "speed.csv")
    assert {row["optimizer"] for row in rows} == {"Adam", "SOAP"} and len(rows) == 24
