"""What train_lic.py's options do: CompressAI's command line, optimizers' arguments, initial weights, averages, quantiles."""

import copy
import math
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
from lic_optimizers import make_optimizers
from lic_parser import make_parser
from short_training import SHORT, assert_resumes_to_the_bit, assert_same, error_line, metrics, options_of, train, weights

pytestmark = pytest.mark.usefixtures("no_curves")


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
        (
            ["--optimizer", "muon", "--conflict-every", "5"],
            "--conflict-every: what Muon makes of a gradient cannot be measured",
        ),
        (["--compare", "muon", "--conflict-every", "5"], "--conflict-every: what Muon makes of a gradient cannot be measured"),
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


@pytest.mark.parametrize("given, lmbda", [([], 0.013), (["--metric", "ms-ssim"], 16.64), (["--lambda", "3"], 3.0)])
def test_each_metric_has_its_own_lambda(given, lmbda):
    """With MSE's a model that is trained on MS-SSIM learns to send nothing."""
    options, _ = parse_options(make_parser(""), given)
    assert options["lmbda"] == lmbda
