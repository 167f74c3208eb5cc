"""examples/study_lic.py: which runs a study asks for, and that it goes on where it was killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import lic_study
import lic_study_runs
import pytest
import study_lic
from lic_files import InputError, write_json
from lic_study import Study
from lic_study_runs import check_options, execute, train
from small_study import PLAN, finish, make_study, table

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
