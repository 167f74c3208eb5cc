"""The parts of examples/train_lic.py: how a run is made and resumed, what its bitstreams say."""

import math
import os
import signal
import subprocess
import sys

import lic_data
import lic_evaluation
import lic_parser
import lic_training
import pytest
import torch
from compressai.entropy_models import EntropyModel
from lic_checkpoint import Checkpoints, read_checkpoint
from lic_optimizers import Schedule
from lic_stop import StopRequest
from torchvision.transforms.functional import to_pil_image

from soap_opt import SOAP

OPTIONS = {
    "model": "bmshj2018-hyperprior", "widths": {"N": 8, "M": 12}, "seed": 0, "device": "cpu", "amp": False,
    "lmbda": 0.013, "metric": "mse", "aux_learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 5, "steps": 24,
    "batch_size": 2, "num_workers": 0, "eval_every": 100, "clip_max_norm": 1.0,
}  # fmt: skip
OPTIONS = {a.dest: a.default for a in lic_parser.make_parser("")._actions if a.dest != "help"} | OPTIONS


@pytest.fixture(scope="module")
def files(photos):
    return lic_data.find_images(photos / "train")


@pytest.fixture(scope="module")
def image(photos):
    return lic_data.read_image(lic_data.find_images(photos / "test")[0])


# ---- a run ----


def test_the_optimizers_differ_in_one_name():
    """SOAP and Adam get the same parameters in the same order from the same call; the quantiles are Adam's in both."""
    soap, adam = (lic_training.Run(OPTIONS, name, 1e-3) for name in ("soap", "adam"))
    assert type(soap.optimizer) is SOAP and type(adam.optimizer) is torch.optim.Adam
    names = []
    for run in (soap, adam):
        assert type(run.aux_optimizer) is torch.optim.Adam
        by_id = {id(p): name for name, p in run.model.named_parameters()}
        names.append([[by_id[id(p)] for p in o.param_groups[0]["params"]] for o in (run.optimizer, run.aux_optimizer)])
        assert all(name.endswith(".quantiles") for name in names[-1][1])
        assert len(names[-1][0]) + len(names[-1][1]) == len(by_id)
    assert names[0] == names[1]
    torch.testing.assert_close(soap.model.state_dict(), adam.model.state_dict(), rtol=0, atol=0)
    x = torch.rand(2, 3, 64, 64)
    losses = []
    for name in ("soap", "adam"):  # the same noise too: before a parameter moves, the losses are equal
        losses.append(lic_training.Run(OPTIONS, name, 1e-3).train_step(x)["loss"])
    assert losses[0].equal(losses[1])


@pytest.mark.parametrize("optimizer", ["soap", "adam", "sgd"])
def test_resume_is_exact(tmp_path, files, image, optimizer):
    """24 steps are 12 steps, a checkpoint and 12 more, to the bit: weights, optimizer state and metrics. Two refreshes
    of SOAP's bases fall into either half."""
    crops = lic_data.RandomCrops(files, (64, 64), OPTIONS["seed"])
    evaluation = [lic_data.centre_crop(image, (64, 64))]

    def train(run, until, path):
        run.train(crops, evaluation, until, StopRequest(), Checkpoints(path))
        return run

    whole = train(lic_training.Run(OPTIONS, optimizer, 1e-3), 24, tmp_path / "whole")
    train(lic_training.Run(OPTIONS, optimizer, 1e-3), 12, tmp_path / "half")
    resumed = lic_training.Run(OPTIONS, optimizer, 1e-3)
    torch.rand(17)  # the noise goes on where the checkpoint says, not where this process stands
    resumed.load(read_checkpoint(tmp_path / "half"))
    train(resumed, 24, tmp_path / "rest")
    a, b = (read_checkpoint(tmp_path / name) for name in ("whole", "rest"))
    for key in ("state_dict", "lr_scheduler", "rng"):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
    for key in ("optimizer", "aux_optimizer"):
        torch.testing.assert_close(a[key]["state"], b[key]["state"], rtol=0, atol=0)
        assert a[key]["param_groups"][0]["lr"] == b[key]["param_groups"][0]["lr"]
    assert whole.evaluations()[-1]["loss"] == resumed.evaluations()[-1]["loss"]
    assert not (tmp_path / "rest.tmp").exists()


def schedule_factor(kind: str, warmup: int, total: int) -> Schedule:
    return Schedule(OPTIONS | {"schedule": kind, "warmup_steps": warmup}, total)


def test_schedules():
    linear = schedule_factor("linear", 50, 1000)
    assert linear(0) == 1 / 50 and linear(49) == linear(699) == 1.0
    assert linear(850) == pytest.approx(0.5) and 0 < linear(999) < 0.004 and linear(1000) == 0.0
    cosine = schedule_factor("cosine", 0, 1000)
    assert cosine(0) == 1.0 and cosine(500) == pytest.approx(0.5) and cosine(1000) == pytest.approx(0.0)
    assert schedule_factor("constant", 4, 10)(1) == 0.5
    assert schedule_factor("constant", 4, 10)(9) == 1.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_wait_for_the_step(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        signal.raise_signal(number)
        assert stop.signal == number
    assert signal.getsignal(number) is before


def test_amp_keeps_likelihoods_in_float32(image):
    x = lic_evaluation.to_float(lic_data.centre_crop(image, (64, 64)))[None]
    exact = lic_training.Run(OPTIONS, "soap", 3e-3).train_step(x)
    run, seen = lic_training.Run(OPTIONS | {"amp": True}, "soap", 3e-3), {}  # the same weights and noise
    run.model.g_a[0].register_forward_hook(lambda m, i, output: seen.update(conv=output.dtype))
    for module in run.model.modules():
        if isinstance(module, EntropyModel):
            module.register_forward_hook(lambda m, i, output: seen.update({type(m).__name__: output[1].dtype}))
    terms = run.train_step(x)
    assert seen == {"conv": torch.bfloat16, "EntropyBottleneck": torch.float32, "GaussianConditional": torch.float32}
    # bfloat16 keeps 8 bits: the distortion agrees to about 1 %
    assert terms["mse"].item() == pytest.approx(exact["mse"].item(), rel=0.02)


# ---- evaluation ----


def test_the_decoder_reproduces_the_forward_pass(image):
    """Sizes that are no multiple of 64, quantiles moved by some training: the decoded image is forward's, and its
    bytes are as many as the likelihoods promise."""
    run = lic_training.Run(OPTIONS, "adam", 1e-3)
    x = lic_evaluation.to_float(lic_data.centre_crop(image, (128, 128)))[None]
    for _ in range(30):
        run.train_step(x)
    odd = lic_data.centre_crop(image, (200, 301))
    model = run.entropy_coding_model()
    result, x_hat = lic_evaluation.code_image(model, odd)
    assert x_hat.shape == odd.shape
    assert result["psnr-rgb"] == pytest.approx(result["psnr-forward"], abs=1e-3)
    means = lic_evaluation.evaluate(run.model, run.criterion, [odd])
    assert means["psnr"] == pytest.approx(result["psnr-forward"], abs=0.02)
    assert means["loss"] == pytest.approx(0.013 * 255**2 * means["mse"] + means["bpp"], rel=1e-5)
    assert run.model.training

    # The coder's tables end at 2^-16, the likelihoods at 1e-9: what the model is badly surprised by costs fewer bits
    # than promised. Beyond that, two strings are rounded up to 32-bit words, and tables to 16 bits.
    with torch.no_grad():
        likelihoods = lic_evaluation.forward_padded(model, lic_evaluation.to_float(odd)[None])["likelihoods"].values()
    floored = sum(-t.clamp(min=2**-16).log2().sum().item() for t in likelihoods) / (200 * 301)
    assert 0.98 * floored < result["bpp"] < 1.02 * result["bpp-estimated"] + 2 * 64 / (200 * 301)


def test_psnr():
    a = torch.zeros(3, 8, 8)
    assert lic_evaluation.psnr(a, a + 1 / 255) == pytest.approx(20 * math.log10(255))
    assert lic_evaluation.psnr(a - 5, a + 1 / 255 + 0.4 / 255) == pytest.approx(20 * math.log10(255))  # saved in 8 bits


@pytest.mark.parametrize("bpp", [0.01, 0.5, 1.3, 99.0])
def test_jpeg_is_the_nearest_in_size(image, bpp):
    pixels = image[0].numel()
    sizes = [8 * len(lic_evaluation.encode_jpeg(to_pil_image(image), q)) / pixels for q in range(1, 96)]
    decoded, found = lic_evaluation.jpeg_at(image, bpp)
    assert decoded.shape == image.shape
    assert found == min(sizes, key=lambda size: abs(size - bpp))


def test_small_images_have_no_ms_ssim(image):
    run = lic_training.Run(OPTIONS, "adam", 1e-3)
    model = run.entropy_coding_model()
    small, large = (lic_evaluation.code_image(model, lic_data.centre_crop(image, (s, s)))[0] for s in (160, 161))
    assert "ms-ssim-rgb" not in small and 0 <= large["ms-ssim-rgb"] <= 1
    assert lic_evaluation.mean_results([small, large]).keys() == small.keys()


# ---- quickstart ----


@pytest.mark.slow
def test_quickstart(examples):
    source = (examples / "quickstart.py").read_text()
    code = [line for line in source.splitlines() if line.strip() and not line.startswith(('"""', "#"))]
    assert len(code) <= 20
    command = [sys.executable, examples / "quickstart.py"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, check=True)
    first, last = (float(line.split()[-2]) for line in (done.stdout.splitlines()[0], done.stdout.splitlines()[-1]))
    assert first < 10 and last > 25


def test_the_moving_average(tmp_path):
    """Of all weights, by its formula from the second step on; a resumed run has the same."""
    run = lic_training.Run(OPTIONS | {"ema": 0.15}, "soap", 1e-3)
    expected = {}
    for step, x in enumerate(torch.rand(4, 2, 3, 64, 64)):
        run.train_step(x)
        keep = min(0.15, (1 + step) / (10 + step)) if step else 0.0
        for name, weight in run.model.named_parameters():
            expected[name] = weight.detach().clone() if step == 0 else keep * expected[name] + (1 - keep) * weight.detach()
    state = run.state()
    for name, weight in expected.items():
        torch.testing.assert_close(state["state_dict"][name], weight)
    assert not torch.equal(state["state_dict"]["g_a.0.weight"], state["unaveraged"]["g_a.0.weight"])

    torch.save(state, tmp_path / "state")
    resumed = lic_training.Run(OPTIONS | {"ema": 0.15}, "soap", 1e-3)
    resumed.load(torch.load(tmp_path / "state", weights_only=True))
    x = torch.rand(2, 3, 64, 64)
    torch.manual_seed(1)
    run.train_step(x)
    torch.manual_seed(1)
    resumed.train_step(x)
    torch.testing.assert_close(dict(resumed.averaged.named_parameters()), dict(run.averaged.named_parameters()), rtol=0, atol=0)
