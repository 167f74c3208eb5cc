"""examples/train_lic.py and signals: runs that are interrupted, killed and gone on with."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import lic_progress
import lic_stop
import lic_training
import pytest
import torch
import train_lic
from short_training import arguments, environment, metrics, weights

# ---- signals and kills ----


def start(examples: Path, options: list[str], **how) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, examples / "train_lic.py", *options],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how,
    )  # fmt: skip


def wait_for_rows(process: subprocess.Popen, folder: Path) -> None:
    while not (folder / "metrics.csv").exists() or not metrics(folder):
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_to_the_whole_process_group(tmp_path, photos, examples, number):
    """As a scheduler or a closed terminal sends them: to the loader's workers too."""
    folder = tmp_path / "run"
    options = arguments(photos, folder, "--steps", "100000", "--eval-every", "100000", "--num-workers", "2")
    process = start(examples, options, start_new_session=True)
    wait_for_rows(process, folder)
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in stderr, stderr
    step = torch.load(folder / "checkpoint.pth.tar", weights_only=True)["step"]
    assert f"stopped at step {step} of 100000" in stdout and "--resume" in stdout


@pytest.mark.slow
def test_nohup(tmp_path, photos, examples):
    """What is ignored on purpose stays ignored."""
    folder = tmp_path / "run"
    options = arguments(photos, folder, "--steps", "60", "--eval-every", "60")
    process = start(examples, options, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for_rows(process, folder)
    process.send_signal(signal.SIGHUP)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_lic.py", "evaluate_lic.py", "quantize_lic.py", "study_lic.py"])
def test_interrupted_while_it_imports(examples, script):
    process = subprocess.Popen([sys.executable, examples / script, "--help"], stderr=subprocess.PIPE, text=True)
    time.sleep(1)  # the interpreter has begun, torch's import takes longer
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "Traceback" not in stderr


@pytest.mark.slow
def test_an_ignored_interrupt_stays_ignored(examples):
    """As in a shell's background job, during the imports and after them."""
    process = start(examples, ["--help"], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, photos, examples):
    """SIGKILL, twice, wherever it hits; resumed, the run ends with the bits of one that nobody killed."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    length = ["--steps", "60", "--eval-every", "15", "--save-every", "4"]
    moment = random.Random()
    for _ in range(2):
        checkpoint = killed / "checkpoint.pth.tar"
        options = ["--resume", str(checkpoint)] if checkpoint.exists() else arguments(photos, killed, *length)
        process = start(examples, options)
        if not checkpoint.exists():
            wait_for_rows(process, killed)
        time.sleep(moment.uniform(0, 3))
        process.kill()
        process.communicate()
        assert metrics(killed)
    assert train_lic.main(["--resume", str(killed / "checkpoint.pth.tar")]) == 0
    assert train_lic.main(arguments(photos, whole, *length)) == 0
    a, b = (torch.load(folder / "checkpoint.pth.tar", weights_only=True) for folder in (killed, whole))
    torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    rows = [[(row["split"], row["step"], row["loss"]) for row in metrics(folder)] for folder in (killed, whole)]
    assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("every", ["4", "10"])
def test_a_signal_during_an_evaluation(tmp_path, photos, monkeypatch, capsys, every):
    """The evaluation is given up, and made by the resumed run: the metrics are those of a run that was not stopped."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    evaluate = lic_training.evaluate

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(lic_training, "evaluate", interrupted)
        assert train_lic.main(arguments(photos, stopped, "--steps", "20", "--eval-every", every)) == 128 + signal.SIGTERM
    assert f"stopped at step {every} of 20" in capsys.readouterr().out
    assert train_lic.main(["--resume", str(stopped / "checkpoint.pth.tar")]) == 0
    assert train_lic.main(arguments(photos, whole, "--steps", "20", "--eval-every", every)) == 0
    rows = [[(row["split"], row["step"], row["loss"], row["learning_rate"]) for row in metrics(f)] for f in (stopped, whole)]
    assert rows[0] == rows[1]


def stopped_at(monkeypatch, step: int, options: list[str]) -> None:
    """Run it, with SIGTERM at the end of this step, before its evaluation."""
    train_step = lic_training.Run.train_step

    def stopping(self, x):
        values = train_step(self, x)
        if self.step == step:
            signal.raise_signal(signal.SIGTERM)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(lic_training.Run, "train_step", stopping)
        assert train_lic.main(options) == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("eval_every", ["100", "4"])
def test_a_signal_before_the_last_evaluation(tmp_path, photos, monkeypatch, capsys, eval_every):
    """The resumed run has no step left, but an evaluation: its result is that of the last step, not of an earlier one."""
    folder = tmp_path / "run"
    stopped_at(monkeypatch, 6, arguments(photos, folder, "--steps", "6", "--eval-every", eval_every))
    assert train_lic.main(["--resume", str(folder / "checkpoint.pth.tar")]) == 0
    last = [row for row in metrics(folder) if row["split"] == "eval"][-1]
    assert last["step"] == "6" and f"evaluation loss {float(last['loss']):.3f}" in capsys.readouterr().out
    assert (folder / "checkpoint_best_loss.pth.tar").exists()


def test_the_best_is_kept_of_an_evaluation_that_a_resumed_run_makes(tmp_path, photos, monkeypatch):
    folder = tmp_path / "run"
    stopped_at(monkeypatch, 4, arguments(photos, folder, "--steps", "30", "--eval-every", "4"))
    assert not (folder / "checkpoint_best_loss.pth.tar").exists()
    stopped_at(monkeypatch, 6, ["--resume", str(folder / "checkpoint.pth.tar")])
    assert torch.load(folder / "checkpoint_best_loss.pth.tar", weights_only=True)["step"] == 4


@pytest.mark.slow
def test_the_learning_rate_falls_at_the_same_step_after_a_stop(tmp_path, photos, monkeypatch):
    """The evaluation that ends a plateau comes just before the checkpoint that the run resumes from."""
    options = ["--optimizer", "sgd", "--learning-rate", "1e-12", "--warmup-steps", "0", "--steps", "9", "--eval-every", "2"]
    options += ["--schedule", "plateau", "--plateau-patience", "1"]
    train_step, evaluate, used = lic_training.Run.train_step, lic_training.Run.evaluate, []

    def noting(self, x):
        used.append(self.optimizer.param_groups[0]["lr"])
        return train_step(self, x)

    def stopping(self, *args):
        best = evaluate(self, *args)
        if self.step == 6:
            signal.raise_signal(signal.SIGTERM)
        return best

    monkeypatch.setattr(lic_training.Run, "train_step", noting)
    assert train_lic.main(arguments(photos, tmp_path / "whole", *options)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(lic_training.Run, "evaluate", stopping)
        assert train_lic.main(arguments(photos, tmp_path / "stopped", *options)) == 128 + signal.SIGTERM
    assert train_lic.main(["--resume", str(tmp_path / "stopped" / "checkpoint.pth.tar")]) == 0
    assert used[:9] == used[9:] == [1e-12] * 6 + [5e-13] * 3


@pytest.mark.slow
def test_a_finished_run_is_written_anew_elsewhere(tmp_path, photos):
    """Under whatever name its checkpoint is."""
    folder = tmp_path / "run"
    assert train_lic.main(arguments(photos, folder, "--steps", "2")) == 0
    kept = (folder / "checkpoint.pth.tar").rename(tmp_path / "kept.pth.tar")
    assert train_lic.main(["--resume", str(kept), "--save", str(tmp_path / "elsewhere")]) == 0
    assert weights(tmp_path / "elsewhere" / "checkpoint.pth.tar").keys() == weights(kept).keys()


# ---- logs ----


def test_a_log_has_a_line_a_minute(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(lic_progress.time, "monotonic", lambda: now[0])
    with lic_progress.Progress(1000, 100, "SOAP") as progress:
        for _ in range(300):
            now[0] += 0.5
            progress.update()
            progress.show("loss 1.0")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == "SOAP step   220 of 1000: loss 1.0; 2 steps/s, 06:30 left"


def test_a_signal_that_comes_twice(monkeypatch):
    """To the process group and through torchrun: one request. A Ctrl-C some seconds later means it."""
    now = [100.0]
    monkeypatch.setattr(lic_stop.time, "monotonic", lambda: now[0])
    with lic_stop.StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        now[0] += 60
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.signal == signal.SIGTERM
