"""examples/train_lic.py when things go wrong: not finite numbers, full and read-only disks."""

import errno
import os
import re
import shlex
import subprocess
from pathlib import Path

import lic_checkpoint
import lic_progress
import lic_training
import pytest
import torch
import train_lic
from lic_arguments import parse_options
from lic_checkpoint import Checkpoints
from lic_parser import make_parser
from short_training import arguments, error_line, metrics, weights

THREE = ["checkpoint.pth.tar", "checkpoint_previous.pth.tar", "checkpoint_best_loss.pth.tar"]


def assert_finite(path: Path) -> None:
    assert all(w.isfinite().all() for w in weights(path).values() if w.is_floating_point()), path


def spoil(monkeypatch, *, from_step: int, until: int = 10**9, value: float = float("nan")) -> None:
    """Every batch of these steps has a loss of `value`."""
    forward = lic_training.Run.forward

    def spoilt(self, x):
        output, terms, distortion = forward(self, x)
        if from_step <= self.step < until:
            terms["loss"] = terms["loss"] * value
        return output, terms, distortion

    monkeypatch.setattr(lic_training.Run, "forward", spoilt)


# ---- what is not finite ----


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("soap", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, photos, capsys, monkeypatch, optimizer):
    """Says when and where, and what is left: a good checkpoint, the metrics until then, and the command to go on."""
    spoil(monkeypatch, from_step=12)
    folder = tmp_path / "run"
    options = arguments(photos, folder, "--optimizer", optimizer, "--steps", "40", "--eval-every", "5", "--save-every", "5")
    assert train_lic.main(options) == 1
    told = capsys.readouterr().err
    label = {"adam": "Adam", "soap": "SOAP"}[optimizer]
    step = 15 if optimizer == "adam" else 30  # Adam's weights are gone, SOAP's are not: that waits for a whole window
    assert re.search(rf"stopped: .* at step {step}; .*(\w+\.)+\w+ is not finite|{label}'s loss is nan at step {step}", told), (
        told
    )
    found = re.search(r"The last good checkpoint is of step (\d+): (\S+)\.", told)
    assert int(found[1]) >= 10 and f"--resume {found[2]}" in told and "--init" in told and "--N 8 --M 12" in told
    for name in THREE:
        if (folder / name).exists():
            assert_finite(folder / name)
    assert (folder / "checkpoint.pth.tar").exists()
    rows = metrics(folder)
    assert [row["step"] for row in rows if row["split"] == "eval"][:2] == ["5", "10"]
    assert not any("nan" in row["loss"] for row in rows)

    monkeypatch.undo()
    assert train_lic.main(["--resume", found[2], "--steps", str(step + 5)]) == 0
    assert metrics(folder)[-1]["step"] == str(step + 5)


def test_the_parameter_is_named_before_clipping_spreads_it(tmp_path, photos, capsys, monkeypatch):
    """Clipping by a norm that is not finite makes every gradient NaN."""
    build = lic_training.build_model

    def with_a_hole(*args):
        model = build(*args)
        model.h_s[2].weight.register_hook(lambda gradient: gradient * float("nan"))
        return model

    monkeypatch.setattr(lic_training, "build_model", with_a_hole)
    monkeypatch.setattr(lic_training.Run, "what_is_not_finite", lambda self: None)
    run = lic_training.Run.means
    monkeypatch.setattr(lic_training.Run, "means", lambda self, window: run(self, window) | {"loss": float("nan")})
    assert train_lic.main(arguments(photos, tmp_path / "run", "--steps", "10")) == 1
    assert "SOAP's loss is nan at step 10; the gradient of h_s.2.weight is not finite" in capsys.readouterr().err


def test_what_soap_passes_over_is_counted(tmp_path, photos, capsys, monkeypatch):
    spoil(monkeypatch, from_step=12, until=14)
    assert train_lic.main(arguments(photos, tmp_path / "run", "--steps", "20")) == 0
    rows = [row for row in metrics(tmp_path / "run") if row["split"] == "train"]
    assert rows[0]["skipped_steps"] == "0" and int(rows[1]["skipped_steps"]) > 20  # of single parameters
    assert all(float(row["loss"]) < float("inf") for row in rows)
    assert re.search(r"SOAP passed over \d+ steps of single parameters", capsys.readouterr().out)
    assert_finite(tmp_path / "run" / "checkpoint.pth.tar")


@pytest.mark.slow
def test_the_new_run_that_is_proposed_is_like_the_one_that_failed(tmp_path, photos, capsys, monkeypatch):
    """But for the learning rate and the weights that it starts from: its command is tried."""
    spoil(monkeypatch, from_step=4)
    options = ["--optimizer", "adam", "--betas", "0.8", "0.9", "--lambda", "0.05", "--schedule", "multistep"]
    options += ["--milestones", "3", "5", "--optimizer-args", "amsgrad=True", "--ema", "0.9", "--epochs", "9"]
    folder = tmp_path / "run"
    assert train_lic.main(arguments(photos, folder, *options, "--eval-every", "2", "--save-every", "2")) == 1
    proposed = shlex.split(capsys.readouterr().err.splitlines()[-1])[2:]
    parser = make_parser("")
    failed, anew = (
        parse_options(parser, argv)[0] for argv in (arguments(photos, folder, *options, "--eval-every", "2"), proposed)
    )
    assert {k for k in anew if anew[k] != failed[k]} == {"init", "learning_rate", "save", "save_every"}
    assert anew["learning_rate"] == 3.3e-4 and Path(anew["init"]).parent == folder

    monkeypatch.undo()
    assert train_lic.main([*proposed, "--save", str(tmp_path / "anew")]) == 0


def test_a_failure_before_the_first_checkpoint(tmp_path, photos, capsys, monkeypatch):
    spoil(monkeypatch, from_step=0)
    assert train_lic.main(arguments(photos, tmp_path / "run", "--optimizer", "adam", "--steps", "10")) == 1
    told = capsys.readouterr().err.splitlines()
    assert "No checkpoint had been written yet" in told[-2] and "--init" not in told[-1]
    assert "--optimizer adam" in told[-1] and "--learning-rate 0.00033" in told[-1]


def test_an_evaluation_that_is_not_finite(tmp_path, photos, capsys, monkeypatch):
    nothing = {"loss": float("nan"), "bpp": float("nan"), "mse": 1.0, "psnr": 1.0}
    monkeypatch.setattr(lic_training, "evaluate", lambda *args: nothing)
    folder = tmp_path / "run"
    assert train_lic.main(arguments(photos, folder, "--steps", "3")) == 1
    assert "the evaluation's loss is nan at step 3" in capsys.readouterr().err
    assert not list(folder.glob("*.json")) and not list(folder.glob("*.pth.tar"))
    assert metrics(folder)[-1]["split"] == "train"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["weight", "state"])
def test_nothing_that_is_not_finite_replaces_a_checkpoint(tmp_path, photos, capsys, monkeypatch, where):
    folder = tmp_path / "run"
    assert train_lic.main(arguments(photos, folder, "--steps", "5")) == 0
    before = (folder / "checkpoint.pth.tar").read_bytes()
    step = lic_training.Run.train_step

    def spoilt(self, x):
        values = step(self, x)
        p = dict(self.model.named_parameters())["g_a.0.weight"]
        with torch.no_grad():
            (p if where == "weight" else self.optimizer.state[p]["basis_1"])[0, 0] = float("inf")
        return values

    monkeypatch.setattr(lic_training.Run, "train_step", spoilt)
    monkeypatch.setattr(lic_training.Run, "evaluate", lambda *args: False)
    assert train_lic.main(["--resume", str(folder / "checkpoint.pth.tar"), "--steps", "6"]) == 1
    name = "g_a.0.weight" if where == "weight" else "basis_1 of g_a.0.weight"
    assert f"stopped: {name} is not finite at step 6" in capsys.readouterr().err
    assert (folder / "checkpoint.pth.tar").read_bytes() == before


def test_a_loss_that_runs_away(tmp_path, photos, capsys, monkeypatch):
    """Finite, and of no use."""
    spoil(monkeypatch, from_step=12, value=1e25)
    assert train_lic.main(arguments(photos, tmp_path / "run", "--steps", "40", "--optimizer", "adam")) == 1
    assert re.search(r"stopped: Adam's loss has run away: .*e\+\d\d at step 20, 2\d\d at the beg", capsys.readouterr().err)


def test_a_learning_rate_that_is_far_too_large(tmp_path, photos, capsys):
    options = ["--steps", "40", "--optimizer", "sgd", "--learning-rate", "1e9", "--warmup-steps", "0", "--clip-max-norm", "0"]
    assert train_lic.main(arguments(photos, tmp_path / "run", *options)) == 1
    assert re.search(r"stopped: (\S+ is not finite|SGD's loss \D*) at step 10", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "entropy_bottleneck.matrices.0 is not finite at step 2"),
        (1e38, "the cumulative distribution of entropy_bottleneck is not finite"),
    ],
)
def test_bisection_does_not_hang_on_what_is_not_finite(tmp_path, photos, capsys, monkeypatch, value, message):
    step = lic_training.Run.train_step

    def spoilt(self, x):
        values = step(self, x)
        with torch.no_grad():
            for matrix in self.model.entropy_bottleneck.matrices:
                matrix.fill_(value)
        return values

    monkeypatch.setattr(lic_training.Run, "train_step", spoilt)
    assert train_lic.main(arguments(photos, tmp_path / "run", "--steps", "2", "--quantiles", "bisection")) == 1
    assert message in capsys.readouterr().err


# ---- checkpoints ----


def test_three_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoint-adam.pth.tar")
    checkpoints.save({"step": 1}, best=True)
    checkpoints.save({"step": 2}, best=False)
    checkpoints.save_best({"step": 3})
    checkpoints.save({"step": 4}, best=False)
    steps = {path.name: torch.load(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {
        "checkpoint-adam.pth.tar": 4, "checkpoint-adam_previous.pth.tar": 2, "checkpoint-adam_best_loss.pth.tar": 3
    }  # fmt: skip
    checkpoints.last.write_bytes(b"the power failed")
    assert checkpoints.newest() == (checkpoints.best, 3)


@pytest.mark.parametrize("links", [True, False])
def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch, links):
    if not links:  # a file system without hard links
        monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError(errno.EPERM, "not here")))
    checkpoints = Checkpoints(tmp_path / "checkpoint.pth.tar")
    for step in (1, 2):
        checkpoints.save({"step": step}, best=True)
    save = torch.save

    def half(state, file):
        save(state, file)
        raise RuntimeError("[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="failed writing"):
        checkpoints.save({"step": 3}, best=True)
    steps = {path.name: torch.load(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"checkpoint.pth.tar": 2, "checkpoint_previous.pth.tar": 1, "checkpoint_best_loss.pth.tar": 2}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of so many bytes; mounting one takes the right to."""
    mounted = []

    def mount(size: int, *options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", folder]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("cannot mount a tmpfs here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk, photos, capsys):
    """Room for one checkpoint of some 0.45 MB: training goes on with a warning, and the end says what is left."""
    folder = small_disk(700_000)
    options = arguments(photos, folder, "--steps", "30", "--eval-every", "10", "--save-every", "10")
    assert train_lic.main(options) == 1
    told = capsys.readouterr()
    assert re.search(r"warning: no checkpoint at step \d+: No space left on device; training goes on", told.out), told.out
    assert "stopped: cannot save step 30: " in told.err and "Traceback" not in told.err
    assert not list(folder.glob("*.tmp")) and not list(folder.glob("*.new"))
    path = Path(re.search(r"The last good checkpoint is of step \d+: (\S+)\.", told.err)[1])
    assert_finite(path)
    assert "when there is room" in told.err and "--learning-rate" not in told.err  # (which is not at fault)
    assert [row["step"] for row in metrics(folder) if row["split"] == "eval"] == ["10", "20", "30"]


@pytest.mark.slow
def test_the_checkpoint_before_the_last_gives_way(small_disk, photos):
    """Room for three, and a fourth while it is written: at the end it is made."""
    folder = small_disk(1_600_000)
    options = arguments(photos, folder, "--steps", "31", "--eval-every", "100", "--save-every", "10")
    train_lic.main(options)  # (the picture does not fit any more)
    assert torch.load(folder / "checkpoint.pth.tar", weights_only=True)["step"] == 31


def test_a_read_only_folder_is_noticed_at_once(small_disk, photos, capsys):
    folder = small_disk(4096, "ro")
    assert "Read-only file system" in error_line(capsys, arguments(photos, folder))
    assert "Read-only file system" in error_line(capsys, arguments(photos, folder / "new"))


def test_metrics_wait_for_room(tmp_path, monkeypatch):
    history = [{"optimizer": "soap", "step": 1}]
    path = tmp_path / "metrics.csv"
    written = lic_progress.Metrics(path)
    written.begin(history)
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    history.append({"optimizer": "soap", "step": 2})
    written.flush()
    assert written.complaint.endswith("No space left")
    monkeypatch.setattr(Path, "open", real_open)
    history.append({"optimizer": "soap", "step": 3})
    written.flush()
    assert written.complaint is None
    assert [row["step"] for row in metrics(tmp_path)] == ["1", "2", "3"]


@pytest.mark.slow
def test_weights_of_data_parallel_training(tmp_path, photos, capsys):
    """What CompressAI's script saves where it used several GPUs."""
    assert train_lic.main(arguments(photos, tmp_path / "first", "--steps", "2")) == 0
    file = tmp_path / "compressai.pth.tar"
    prefixed = {f"module.{key}": value for key, value in weights(tmp_path / "first" / "checkpoint.pth.tar").items()}
    torch.save({"epoch": 3, "state_dict": prefixed, "loss": 1.0}, file)
    assert train_lic.main(arguments(photos, tmp_path / "run", "--steps", "1", "--init", str(file))) == 0
    assert "--init starts from its weights" in error_line(capsys, ["--resume", str(file)])


@pytest.mark.slow
def test_the_best_of_a_killed_run_is_not_overwritten(tmp_path, photos, capsys):
    folder = tmp_path / "run"
    assert train_lic.main(arguments(photos, folder, "--steps", "2")) == 0
    (folder / "checkpoint.pth.tar").unlink()
    assert f"--resume {folder / 'checkpoint_best_loss.pth.tar'}" in error_line(capsys, arguments(photos, folder))


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(tmp_path, photos, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    with lic_checkpoint.lock_folder(folder):
        assert "another run is writing there" in error_line(capsys, arguments(photos, folder, "--steps", "1"))
        (folder / "checkpoint.pth.tar").touch()  # which may not be resumed while the run goes on
        assert "another run is writing there" in error_line(capsys, arguments(photos, folder, "--steps", "1"))
        (folder / "checkpoint.pth.tar").unlink()
    assert train_lic.main(arguments(photos, folder, "--steps", "1")) == 0
