"""What train_lic.py's options do: CompressAI's own command line, schedules, optimizers' arguments, initial weights, averages,
quantiles, combinations of gradients, and several processes."""

import copy
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import lic_training
import pytest
import torch
import train_lic
from lic_arguments import parse_options
from lic_data import find_images
from lic_evaluation import evaluate, to_float
from lic_files import InputError
from lic_images import centre_crop, read_image
from lic_models import build_model
from lic_optimizers import Gradients, make_optimizers
from lic_parser import make_parser
from test_train_lic import TINY, environment, error_line, metrics, weights

SHORT = [*TINY[:-3], "--eval-crop", "64", "64", "--schedule", "constant", "--warmup-steps", "2"]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """They have tests of their own, and take longer than the training here."""
    monkeypatch.setattr(train_lic, "plot_curves", lambda *args, **kwargs: None)


def train(folder: Path, photos: Path, *more: str) -> dict:
    """Train and return the checkpoint. One thread, few channels, small crops."""
    assert train_lic.main([*SHORT, "--dataset", str(photos), "--save", str(folder), "--bitstreams", "none", *more]) == 0
    return torch.load(folder / "checkpoint.pth.tar", weights_only=True)


def assert_resumes_to_the_bit(tmp_path: Path, photos: Path, *more: str, steps: int = 6, stop: int = 3) -> dict:
    """`steps` steps are `stop` of them, a checkpoint, and the rest. Returns the whole run's checkpoint."""
    whole = train(tmp_path / "whole", photos, "--eval-every", str(stop), *more, "--steps", str(steps))
    train(tmp_path / "part", photos, "--eval-every", str(stop), *more, "--steps", str(stop))
    path = tmp_path / "part" / "checkpoint.pth.tar"
    torch.rand(7)  # noise goes on from the checkpoint, not from here
    assert train_lic.main(["--resume", str(path), "--steps", str(steps)]) == 0
    part = torch.load(path, weights_only=True)
    assert part["step"] == whole["step"] == steps
    for key in ("state_dict", "unaveraged", "rng", "gradients", "schedule"):
        assert_same(whole[key], part[key])
    assert_same(whole["optimizer"]["state"], part["optimizer"]["state"])
    rates = [[group["lr"] for group in state["optimizer"]["param_groups"]] for state in (whole, part)]
    assert rates[0] == rates[1]
    losses = [[row["loss"] for row in state["history"] if row["split"] == "eval"] for state in (whole, part)]
    assert losses[0] == losses[1]
    return whole


def assert_same(a, b) -> None:
    """Nested containers of tensors and plain values, to the bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for pair in zip(a, b):
            assert_same(*pair)
    else:
        assert a == b


def options_of(*arguments: str) -> dict:
    options, _ = parse_options(make_parser(""), [*SHORT, *arguments])
    return options | {"steps": options["steps"] or 10}


@pytest.fixture
def runs(monkeypatch) -> list[lic_training.Run]:
    """The runs that are made, in their order."""
    made = []

    class Recorded(lic_training.Run):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(train_lic, "Run", Recorded)
    return made


# ---- CompressAI's command line ----

THEIRS = ["-m", "mbt2018-mean", "--batch-size", "16", "-lr", "1e-4", "--save"]


def test_compressais_command_line(capsys, monkeypatch, photos):
    command = [*THEIRS, "-d", str(photos), "--cuda"]
    if not torch.cuda.is_available():
        assert error_line(capsys, command).startswith("train_lic.py: error: --device cuda: ")
    monkeypatch.setattr("lic_arguments.check_device", lambda device: None)
    options, state = parse_options(make_parser(""), [*command, "--test-batch-size", "64", "--clip_max_norm", "0.5"])
    expected = {"model": "mbt2018-mean", "batch_size": 16, "learning_rate": 1e-4, "device": "cuda", "dataset": str(photos),
                "test_batch_size": 64, "clip_max_norm": 0.5}  # fmt: skip
    assert state is None and {key: options[key] for key in expected} == expected
    assert not options["save"]  # a folder of the run's own


def test_compressais_command_line_trains(tmp_path, photos, monkeypatch, capsys):
    """But for --cuda, and narrow."""
    monkeypatch.chdir(tmp_path)
    command = [*THEIRS, "-d", str(photos), "-e", "1", "--clip_max_norm", "1.0", "--test-batch-size", "64"]
    assert train_lic.main([*command, "--N", "8", "--M", "12", "--bitstreams", "none", "--eval-crop", "64", "64"]) == 0
    folder = Path("runs") / "mbt2018-mean-soap"
    assert f"Results are in {folder}/" in capsys.readouterr().out
    assert torch.load(folder / "checkpoint.pth.tar", weights_only=True)["step"] == 1
    (row,) = [row for row in metrics(folder) if row["split"] == "train"]
    assert float(row["learning_rate"]) == pytest.approx(1e-4 / 50)


def test_images_are_evaluated_together_as_alone(examples):
    """Of two sizes, so that a batch ends before it is full."""
    files = find_images(examples / "photos" / "eval")[:5]
    images = [centre_crop(read_image(file), size) for file, size in zip(files, [(64, 64)] * 3 + [(64, 128)] * 2)]
    run = lic_training.Run(options_of(), "soap", 1e-3)
    alone, together = (evaluate(run.model, run.criterion, images, size) for size in (1, 64))
    assert together == pytest.approx(alone, rel=1e-5)


def test_test_batch_size_reaches_the_evaluation(tmp_path, photos, monkeypatch):
    sizes = []
    monkeypatch.setattr(lic_training, "evaluate", lambda *args: sizes.append(args[3]) or evaluate(*args))
    train(tmp_path / "run", photos, "--steps", "1", "--test-batch-size", "5")
    assert sizes == [5]


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


# ---- the optimizer's arguments ----


def groups_of(name: str, *arguments: str) -> list[dict]:
    """The param groups that these arguments make, with the parameters' names."""
    options = options_of("--optimizer", name, *arguments)
    model = build_model(options["model"], options["widths"])
    optimizer, _ = make_optimizers(model, options, name, 1e-3)
    names = {p: n for n, p in model.named_parameters()}
    return [group | {"names": [names[p] for p in group["params"]]} for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("soap", ["--weight-decay", "0"], {"weight_decay": 0.0}),
        ("adamw", ["--weight-decay", "0.3"], {"weight_decay": 0.3}),
        ("soap", ["--betas", "0.9", "0.99"], {"betas": (0.9, 0.99)}),
        ("adam", ["--betas", "0.5", "0.6"], {"betas": (0.5, 0.6)}),
        ("soap", ["--precondition-frequency", "3", "--refresh", "together"],
         {"precondition_frequency": 3, "refresh": "together"}),
        ("soap", ["--optimizer-args", "max_grad_norm=2", "eps=1e-6"], {"max_grad_norm": 2, "eps": 1e-6}),
        ("sgd", ["--optimizer-args", "nesterov=True"], {"nesterov": True, "momentum": 0.9}),
        ("sgd", ["--optimizer-args", "momentum=0.5"], {"momentum": 0.5}),
        ("muon", ["--weight-decay", "0.2"], {"weight_decay": 0.2}),
    ],
)  # fmt: skip
def test_arguments_reach_the_optimizer(name, arguments, expected):
    for group in groups_of(name, *arguments):
        assert {key: group[key] for key in expected} == expected


def test_patterns_make_groups():
    plain, *others = groups = groups_of("soap", "--no-precondition", "*.gamma", "entropy_*", "--no-weight-decay", "*.bias")
    assert sorted(name for group in groups for name in group["names"]) == sorted(groups_of("soap")[0]["names"])
    for group in groups:
        for name in group["names"]:
            assert (group["weight_decay"] == 0) == name.endswith(".bias"), name
            assert (group["max_precond_dim"] == 0) == (name.endswith(".gamma") or name.startswith("entropy_")), name
    assert len(groups) == 3

    for group in groups_of("muon", "--no-precondition", "g_a.0.*"):
        dims = {name: name.startswith("g_a.0.") or not name.endswith(("weight", "gamma")) for name in group["names"]}
        assert {n for n, adamw in dims.items() if adamw == group["use_muon"] and "entropy" not in n} == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "adam", "--refresh", "together"], "--refresh: Adam has no such argument"),
        (["--optimizer", "sgd", "--betas", "0.9", "0.9"], "--betas: SGD has no such argument"),
        (["--optimizer", "adamw", "--precondition-frequency", "5"], "--precondition-frequency: AdamW has no such argument"),
        (["--optimizer", "adam", "--no-precondition", "*"], "--no-precondition: Adam has no preconditioner"),
        (["--no-precondition", "*.gama"], "--no-precondition *.gama matches no parameter of bmshj2018-hyperprior"),
        (["--no-weight-decay", "*.bias", "x"], "--no-weight-decay x matches no parameter of bmshj2018-hyperprior"),
        (["--optimizer-args", "beta=1"], "--optimizer-args beta: SOAP has no such argument"),
        (["--optimizer-args", "lr=1"], "the optimizer's arguments: "),
        (["--optimizer-args", "eps=-1"], "-1"),
        (["--optimizer-args", "eps"], "argument --optimizer-args: eps is not NAME=VALUE"),
        (["--betas", "0.9", "1"], "argument --betas: 1 is not in [0, 1)"),
        (["--save-every", "x"], "invalid number of steps, or of minutes as 10m value: 'x'"),
        (["--save-every", "0"], "argument --save-every: 0 is not above 0"),
        (["--save-every", "m"], "argument --save-every: invalid number of steps, or of minutes as 10m value: 'm'"),
        (["--save-every", "2.5"], "argument --save-every: invalid number of steps"),
        (["--bitstreams", "0"], "argument --bitstreams: 0 is not above 0"),
        (["--bitstreams", "some"], "argument --bitstreams: invalid number of images, all or none value: 'some'"),
        (["--ema", "1"], "argument --ema: 1 is not in [0, 1)"),
        (["--init", "/nowhere"], "cannot read the checkpoint /nowhere: "),
        (["--optimizer", "muon", "--conflict-every", "5"], "--conflict-every: no preconditioner of Muon is known"),
        (["--compare", "muon", "--conflict-every", "5"], "--conflict-every: no preconditioner of Muon is known"),
    ],
)
def test_what_cannot_be_had(tmp_path, photos, capsys, arguments, message):
    """Said before training, of the comparison too."""
    line = error_line(capsys, [*SHORT, "--dataset", str(photos), "--save", str(tmp_path / "run"), "--steps", "1", *arguments])
    assert message in line
    assert not list(tmp_path.glob("run/*.tar"))


def test_the_comparison_keeps_its_defaults(tmp_path, photos, runs):
    own = ["--weight-decay", "0.2", "--betas", "0.8", "0.9", "--no-weight-decay", "*.bias", "--no-precondition", "*.gamma",
           "--optimizer-args", "eps=1e-5"]  # fmt: skip
    train(tmp_path / "run", photos, "--steps", "1", "--compare", "adamw", *own)
    soap, adamw = (run.optimizer for run in runs[-2:])
    assert {group["weight_decay"] for group in soap.param_groups} == {0.2, 0.0}
    assert {(group["betas"], group["eps"]) for group in soap.param_groups} == {((0.8, 0.9), 1e-5)}
    (group,) = adamw.param_groups
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.01, (0.9, 0.999), 1e-8)


# ---- initial weights ----


@pytest.mark.slow
def test_initial_weights(tmp_path, photos, runs, capsys):
    """Training starts where the other run ended, whatever its optimizer, and goes on when the file is gone."""
    for optimizer in ("soap", "adam"):
        state = train(tmp_path / optimizer, photos, "--steps", "8", "--optimizer", optimizer)
        ended = state["history"][-1]["loss"]
        before = tmp_path / optimizer / "checkpoint.pth.tar"
        new = train(tmp_path / ("after " + optimizer), photos, "--steps", "1", "--init", str(before), "--learning-rate", "1e-9")
        assert new["step"] == 1 and new["history"][-1]["loss"] == pytest.approx(ended, rel=1e-4)
        assert f"initial weights from {before}" in capsys.readouterr().out
    before.unlink()
    assert train_lic.main(["--resume", str(tmp_path / "after adam" / "checkpoint.pth.tar"), "--steps", "2"]) == 0


def test_initial_weights_of_compressai(tmp_path, capsys, photos):
    """Its checkpoints, bare weights, and those of several GPUs; with the entropy coder's tables."""
    options = options_of()
    torch.manual_seed(5)
    model = build_model(options["model"], options["widths"])
    model.update(force=True)
    state = model.state_dict()
    for number, saved in enumerate(
        [{"epoch": 3, "state_dict": state}, state, {"state_dict": {"module." + key: value for key, value in state.items()}}]
    ):
        torch.save(saved, tmp_path / str(number))
        run = lic_training.Run(options | {"init": str(tmp_path / str(number)), "ema": 0.9}, "soap", 1e-3)
        assert_same(dict(run.model.state_dict()), dict(state))
        assert_same(dict(run.averaged.state_dict()), dict(state))
    torch.save({"state_dict": [1.0]}, tmp_path / "list")
    with pytest.raises(InputError, match="list does not fit"):
        lic_training.Run(options | {"init": str(tmp_path / "list")}, "soap", 1e-3)
    wide = ["--dataset", str(photos), "--N", "16", "--M", "12", "--steps", "1", "--save", str(tmp_path / "run")]
    line = error_line(capsys, [*wide, "--init", str(tmp_path / "1")])
    assert f"--init {tmp_path / '1'} does not fit bmshj2018-hyperprior of these widths: " in line


# ---- averages ----


@pytest.mark.parametrize(("decay", "amp"), [(0.5, []), (0.999, ["--amp"])])
def test_the_average_is_evaluated_and_kept(tmp_path, photos, runs, monkeypatch, decay, amp):
    """By hand: the first step's weights, then each step's mixed in, at first with a shorter memory. With --amp forward methods
    are replaced, and the average's must not be those of the weights in training."""
    after = []
    step = lic_training.Run.train_step

    def noted(self, x):
        values = step(self, x)
        after.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return values

    monkeypatch.setattr(lic_training.Run, "train_step", noted)
    state = train(tmp_path / "run", photos, "--steps", "5", "--ema", str(decay), *amp)
    average = copy.deepcopy(after[0])
    for n, current in enumerate(after[1:], start=1):
        kept = min(decay, (1 + n) / (10 + n))
        average = {name: kept * average[name] + (1 - kept) * current[name] for name in average}
    for name, value in average.items():
        torch.testing.assert_close(state["state_dict"][name], value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(state["unaveraged"][name], after[-1][name], rtol=0, atol=0)
    assert not state["state_dict"]["g_a.0.weight"].equal(after[-1]["g_a.0.weight"])

    fresh = build_model("bmshj2018-hyperprior", {"N": 8, "M": 12})
    fresh.load_state_dict(state["state_dict"])
    images = [centre_crop(read_image(file), (64, 64)) for file in find_images(photos / "test")]
    assert evaluate(fresh, runs[-1].criterion, images)["loss"] == pytest.approx(state["history"][-1]["loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("amp", [[], ["--amp"]])
def test_the_average_resumes_to_the_bit(tmp_path, photos, amp):
    assert_resumes_to_the_bit(tmp_path, photos, "--ema", "0.9", *amp)


# ---- quantiles ----


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--ema", "0.5"]])
def test_bisection(tmp_path, photos, runs, more):
    """The quantiles are where the cumulative distribution is half the tail mass, a half, and all but half the tail mass; and
    the hyper-latent's bitstream, whose tables come from them, is as long as its likelihoods say."""
    train(tmp_path / "run", photos, "--quantiles", "bisection", "--steps", "15", "--warmup-steps", "0", *more)
    assert runs[-1].aux_optimizer is None
    saved = build_model("bmshj2018-hyperprior", {"N": 8, "M": 12})
    saved.load_state_dict(weights(tmp_path / "run" / "checkpoint.pth.tar"))
    model = runs[-1].entropy_coding_model()
    for bottleneck in (m.entropy_bottleneck for m in (saved, model, runs[-1].model)):
        assert bottleneck.quantiles.std() > 0.01  # (they began at -10, 0, 10 in every channel)
        with torch.no_grad():
            logits = bottleneck._logits_cumulative(bottleneck.quantiles, stop_gradient=True)  # [8, 1, 3]
        tail = math.log(bottleneck.tail_mass / 2)  # (of so small a probability logarithm and logit are the same)
        torch.testing.assert_close(logits, torch.tensor([tail, 0, -tail]).expand_as(logits), rtol=1e-3, atol=1e-3)

    # Of the latent itself many likelihoods are at their bound of 1e-9 after so few steps, and the coder is better than that.
    x = to_float(read_image(find_images(photos / "test")[0]))[None, :, :256, :512]
    with torch.no_grad():
        promised = -model(x)["likelihoods"]["z"].log2().sum().item()
        _, (string,) = model.compress(x)["strings"]
    assert 8 * len(string) == pytest.approx(promised, rel=0.03, abs=64)


@pytest.mark.slow
def test_bisection_resumes_to_the_bit(tmp_path, photos):
    assert_resumes_to_the_bit(tmp_path, photos, "--quantiles", "bisection")


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


# ---- several processes ----

TWO = ["--nnodes", "1", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
PROBE = """
import hashlib, os, signal, sys, time
from pathlib import Path
examples, folder, *rest = sys.argv[1:]
sys.path.insert(0, examples)
import train_lic
rank, runs, stops = int(os.environ["RANK"]), [], []

class Run(train_lic.Run):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        runs.append(self)

    def train_step(self, x):
        values = super().train_step(x)
        if self.options["steps"] == 1000 and self.step == 12 and rank == 0:
            os.kill(os.getppid(), signal.SIGTERM)  # torchrun's process, which tells its processes
            while not stops[-1].signal:
                time.sleep(0.01)
        return values

class StopRequest(train_lic.StopRequest):
    def __enter__(self):
        stops.append(self)
        return super().__enter__()

train_lic.Run, train_lic.StopRequest = Run, StopRequest
train_lic.World.leave = lambda self: None  # several runs in a row
while rest:
    end = rest.index(";")
    status, rest = train_lic.main(rest[:end]), rest[end + 1 :]
    parts = [t.numpy().tobytes() for t in (*runs[-1].model.state_dict().values(), runs[-1].gradients.state_dict()["logits"])]
    states = runs[-1].optimizer.state_dict()["state"].values()
    parts += [t.numpy().tobytes() for state in states for t in state.values() if hasattr(t, "numpy")]
    with Path(folder, f"rank{rank}").open("a") as file:
        print(status, hashlib.sha256(b"".join(parts)).hexdigest(), file=file, flush=True)
sys.exit(status)
"""


@pytest.mark.slow
def test_two_processes(tmp_path, photos, examples):
    """They end with equal weights and optimizer states, to the bit those of a run that was resumed half way; one alone speaks
    and writes; what they say of the model is what one process says. SIGTERM to torchrun leaves the checkpoint that a run of so
    many steps leaves. With famo, whose weights of the two terms are of the whole batch too."""
    part, resumed, whole, stopped = (tmp_path / name for name in ("part", "resumed", "whole", "stopped"))
    begin = [*SHORT, "--dataset", str(photos), "--bitstreams", "none", "--eval-every", "100", "--gradients", "famo"]
    commands = [
        [*begin, "--steps", "12", "--save", str(part)],
        ["--resume", str(part / "checkpoint.pth.tar"), "--steps", "22", "--save", str(resumed)],
        [*begin, "--steps", "22", "--save", str(whole)],
        [*begin, "--steps", "1000", "--save", str(stopped)],
    ]
    (tmp_path / "probe.py").write_text(PROBE)
    arguments = [argument for command in commands for argument in (*command, ";")]
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *TWO, tmp_path / "probe.py", examples, tmp_path, *arguments],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.stdout.count("Results are in") == 3, process.stdout + process.stderr
    assert process.stdout.count("stopped at step 12 of 1000 (SOAP)") == 1
    first, second = ((tmp_path / f"rank{rank}").read_text().splitlines() for rank in (0, 1))
    assert first == second
    assert [line.split()[0] for line in first] == ["0", "0", "0", str(128 + signal.SIGTERM)]
    assert first[1] == first[2] and first[0].split()[1] == first[3].split()[1]

    saved = {path: torch.load(path / "checkpoint.pth.tar", weights_only=True) for path in (part, resumed, whole, stopped)}
    for a, b in ((part, stopped), (resumed, whole)):
        for key in ("state_dict", "rngs", "step", "schedule", "gradients"):
            assert_same(saved[a][key], saved[b][key])
        assert_same(saved[a]["optimizer"]["state"], saved[b]["optimizer"]["state"])
    own, others = saved[stopped]["windows"]  # of the two steps since the last row
    assert len(own) == len(others) == 2 and own[0]["loss"] != others[0]["loss"]
    assert not saved[whole]["rngs"][0].equal(saved[whole]["rngs"][1])  # noise of their own
    assert [(row["split"], row["step"]) for row in metrics(whole)] == [
        ("train", "10"), ("train", "20"), ("train", "22"), ("eval", "22")
    ]  # fmt: skip

    model = build_model("bmshj2018-hyperprior", {"N": 8, "M": 12})
    model.load_state_dict(saved[whole]["state_dict"])
    images = [centre_crop(read_image(file), (64, 64)) for file in find_images(photos / "test")]
    alone = evaluate(model, lic_training.Run(options_of(), "soap", 1e-3).criterion, images)
    assert {key: saved[whole]["history"][-1][key] for key in alone} == pytest.approx(alone, rel=1e-6)


def test_a_batch_that_cannot_be_shared(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--batch-size 3 cannot be shared equally by 2 processes" in error_line(capsys, ["--batch-size", "3"])


@pytest.mark.parametrize("given, lmbda", [([], 0.013), (["--metric", "ms-ssim"], 16.64), (["--lambda", "3"], 3.0)])
def test_each_metric_has_its_own_lambda(given, lmbda):
    """With MSE's a model that is trained on MS-SSIM learns to send nothing."""
    options, _ = parse_options(make_parser(""), given)
    assert options["lmbda"] == lmbda
