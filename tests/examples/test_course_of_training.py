"""How train_lic.py trains: schedules, combinations of gradients, other optimizers, what is written and measured on the way."""

import json
import math
import sys

import lic_training
import pytest
import torch
import train_lic
from lic_optimizers import Gradients
from short_training import assert_resumes_to_the_bit, assert_same, error_line, metrics, options_of, train

pytestmark = pytest.mark.usefixtures("no_curves")


# ---- schedules ----


@pytest.fixture
def losses(monkeypatch) -> list[float]:
    """What evaluations say, one after the other."""
    said: list[float] = []

    def told(*args):
        return {"loss": said.pop(0), "bpp": 1.0, "mse": 0.1, "psnr": 10.0}

    monkeypatch.setattr(lic_training, "evaluate", told)
    return said


@pytest.fixture
def rates(monkeypatch) -> list[float]:
    """The learning rates of all steps, in units of 3e-3."""
    used = []
    step = lic_training.Run.train_step

    def noted(self, x):
        used.append(round(self.optimizer.param_groups[0]["lr"] / 3e-3, 9))
        return step(self, x)

    monkeypatch.setattr(lic_training.Run, "train_step", noted)
    return used


@pytest.mark.slow
def test_plateau_halves_after_patience_and_resumes_to_the_bit(tmp_path, photos, losses, rates):
    """Evaluations every step, falling until the third: the fourth to the sixth (patience 2 and one more) halve."""
    said = [5.0, 4.0, 3.0] + [3.0] * 6
    options = ["--schedule", "plateau", "--plateau-patience", "2", "--warmup-steps", "4", "--eval-every", "1"]
    losses[:] = said
    whole = train(tmp_path / "whole", photos, *options, "--steps", "9")
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.5, 0.5]
    assert whole["schedule"]["factor"] == 0.25  # the ninth evaluation's doing
    rates.clear()
    losses[:] = said
    train(tmp_path / "part", photos, *options, "--steps", "6")  # right where it halves
    assert train_lic.main(["--resume", str(tmp_path / "part" / "checkpoint.pth.tar"), "--steps", "9"]) == 0
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.5, 0.5]
    part = torch.load(tmp_path / "part" / "checkpoint.pth.tar", weights_only=True)
    for key in ("state_dict", "schedule"):
        assert_same(whole[key], part[key])


def test_plateau_uses_lr_decay(tmp_path, photos, losses, rates):
    losses[:] = [1.0] * 4
    options = ["--schedule", "plateau", "--plateau-patience", "1", "--warmup-steps", "0", "--eval-every", "1", "--lr-decay"]
    train(tmp_path / "run", photos, *options, "0.1", "--steps", "4")
    assert rates == [1, 1, 1, 0.1]


def test_multistep(tmp_path, photos, rates):
    options = ["--schedule", "multistep", "--milestones", "5", "3", "--warmup-steps", "2", "--steps", "7"]
    train(tmp_path / "run", photos, *options)
    assert rates == [0.5, 1, 1, 0.5, 0.5, 0.25, 0.25]


# ---- combinations of gradients ----


def combined(kind: str, a: list[float], b: list[float]) -> torch.Tensor:
    """What it makes of two gradients: the losses are linear."""
    p = torch.nn.Parameter(torch.ones(len(a)))
    rate, distortion = (torch.tensor(g) @ p for g in (a, b))
    state = torch.get_rng_state()
    Gradients(kind, [p], 0).backward(rate + distortion, rate, distortion, 0)
    assert torch.get_rng_state().equal(state)
    return p.grad


@pytest.mark.parametrize("kind", ["pcgrad", "upgrad"])
def test_conflicting_gradients(kind):
    """For two both methods project each onto what is normal to the other, and add (arXiv 2001.06782, algorithm 1)."""
    a, b = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([-2.0, 1.0, 0.5])
    assert a @ b < 0
    expected = (a - (a @ b) / (b @ b) * b) + (b - (a @ b) / (a @ a) * a)
    torch.testing.assert_close(combined(kind, a.tolist(), b.tolist()), expected, rtol=1e-3, atol=1e-3)
    b = -b  # they agree: nothing is taken away
    torch.testing.assert_close(combined(kind, a.tolist(), b.tolist()), a + b, rtol=1e-3, atol=1e-3)


def test_famo_weighs_the_terms():
    """At equal weights, 1 / (1 / R + 1 / D) of the gradients of log R and log D (arXiv 2306.03792, equation 10)."""
    rate, distortion = 1.0 + 2.0, 4.0 + 1.0  # at p = 1
    weight = 1 / (1 / rate + 1 / distortion)
    expected = weight * (torch.tensor([1.0, 2.0]) / rate + torch.tensor([4.0, 1.0]) / distortion)
    torch.testing.assert_close(combined("famo", [1.0, 2.0], [4.0, 1.0]), expected)


def test_combinations_see_the_same_noise():
    """The first loss is the same, and the generator of the noise stands where it stood after each step."""
    x = torch.rand(2, 3, 64, 64)
    losses, states, moved = {}, {}, {}
    for kind in ("sum", "pcgrad", "upgrad", "famo"):
        run = lic_training.Run(options_of("--gradients", kind), "soap", 1e-3)
        losses[kind] = [run.train_step(x)["loss"].item() for _ in range(3)]
        states[kind], moved[kind] = torch.get_rng_state(), run.model.g_a[0].weight.detach()
    for kind in ("pcgrad", "upgrad", "famo"):
        assert losses[kind][0] == losses["sum"][0]
        assert states[kind].equal(states["sum"])
        assert not moved[kind].equal(moved["sum"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["famo", "pcgrad"])
def test_combinations_resume_to_the_bit(tmp_path, photos, kind):
    state = assert_resumes_to_the_bit(tmp_path, photos, "--gradients", kind)
    assert (kind == "famo") == bool(state["gradients"])


def test_without_torchjd(tmp_path, photos, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    line = error_line(
        capsys, ["--dataset", str(photos), "--save", str(tmp_path / "run"), "--steps", "1", "--gradients", "upgrad"]
    )
    assert "--gradients upgrad needs torchjd: pip install " in line


def test_without_pytorch_optimizer(tmp_path, photos, capsys, monkeypatch):
    """Said of the comparison too, before the first run trains."""
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    for flag in ("--optimizer", "--compare"):
        line = error_line(capsys, ["--dataset", str(photos), "--save", str(tmp_path / flag), "--steps", "1", flag, "muon"])
        assert "--optimizer muon needs the package pytorch_optimizer" in line


# ---- other optimizers ----


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_other_optimizers_resume_to_the_bit(tmp_path, photos, optimizer):
    state = assert_resumes_to_the_bit(tmp_path, photos, "--optimizer", optimizer, "--no-weight-decay", "*.bias")
    assert state["optimizer_name"] == optimizer
    assert all(w.isfinite().all() for w in state["state_dict"].values() if w.is_floating_point())


# ---- results ----


@pytest.mark.slow
def test_bitstreams(tmp_path, photos, capsys):
    train(tmp_path / "none", photos, "--steps", "1")
    names = {file.name for file in (tmp_path / "none").iterdir()}
    assert not names & {"reconstructions.png", "eval-soap.json"} and "metrics.csv" in names
    capsys.readouterr()
    train(tmp_path / "one", photos, "--steps", "1", "--bitstreams", "1")
    assert "SOAP: 1 whole images coded and decoded" in capsys.readouterr().out
    assert (tmp_path / "one" / "reconstructions.png").exists()
    assert json.loads((tmp_path / "one" / "eval-soap.json").read_text())["results"]["bpp"][0] > 0


def test_checkpoints_are_due_by_steps_or_minutes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(lic_training.time, "monotonic", lambda: now[0])
    assert [options_of("--save-every", text)["save_every"] for text in ("10m", "0.5m", "500")] == [
        ("minutes", 10.0), ("minutes", 0.5), ("steps", 500)
    ]  # fmt: skip
    run = lic_training.Run(options_of("--save-every", "500"), "sgd", 1e-3)
    run.step, now[0] = 499, 1e9
    run.saved = (0, 0.0)
    assert not run.is_due()
    run.step = 1000
    assert run.is_due()
    run.saved = (501, 0.0)
    assert not run.is_due()
    run.options, run.saved = options_of("--save-every", "10m"), (0, 0.0)
    now[0] = 599.0
    assert not run.is_due()
    now[0] = 600.0
    assert run.is_due()


def test_conflicts_are_measured_beside_training(tmp_path, photos):
    plain = train(tmp_path / "plain", photos, "--steps", "5")
    measured = train(tmp_path / "measured", photos, "--steps", "5", "--conflict-every", "2")
    for key in ("state_dict", "rng"):
        assert_same(plain[key], measured[key])
    rows = [row for row in metrics(tmp_path / "measured") if row["split"] == "conflict"]
    assert [row["step"] for row in rows] == ["2", "4"]
    for row in rows:
        for column in ("raw", "raw_shared", "preconditioned", "preconditioned_shared", "between_steps"):
            value = float(row[column])
            assert -1 <= value <= 1 or (math.isnan(value) and row["step"] == "2"), (column, value)
