"""examples/quantize_lic.py and its quantiser: quantised models, coding with them, the command."""

import csv
import itertools
import json
import re
from pathlib import Path

import lic_quantization
import pytest
import quantize_lic
import torch
from compressai.layers import CheckerboardMaskedConv2d
from lic_evaluation import code_image
from lic_files import InputError
from lic_grids import channel_weights
from lic_images import centre_crop, read_image
from lic_models import build_model
from lic_quantization import calibrate, quantize, quantize_module
from PIL import Image
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
    pytest.mark.usefixtures("few_samples"),
]
TINY = {"N": 8, "M": 12}


def photo(examples: Path, index: int, height: int = 64, width: int = 128) -> torch.Tensor:
    file = sorted((examples / "photos" / "eval").iterdir())[index]
    return centre_crop(read_image(file), (height, width)).contiguous()


def random_model(name: str = "bmshj2018-hyperprior", seed: int = 0):
    """Tiny, with weights that send something through every layer: CompressAI's own initial values round y to 0."""
    torch.manual_seed(seed)
    model = build_model(name, TINY)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.weight.mul_(1.7)
                module.bias.normal_(0, 0.1)
    model.update(force=True)
    return model.eval()


# --------------------------------------------------------------------------------------------------------------- models


def test_the_model_is_not_changed_and_its_copy_is_quantised(examples):
    model = random_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantized = quantize(model, [photo(examples, 0)], 4, 8)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    calibrate(model, [photo(examples, 0)[None] / 255])
    assert not any(module._forward_pre_hooks for module in model.modules())
    names = lic_quantization.quantizable_layers(model)
    assert len(names) == 14 + 6  # convolutions, GDN
    for name in names:
        layer = quantized.get_submodule(name)
        steps = channel_weights(layer) / layer.weight_scale
        # (GDN's are squares of the parameters that give them)
        torch.testing.assert_close(steps, steps.round(), rtol=1e-5, atol=1e-4)
        values = layer.input_quantizer(torch.linspace(-9, 9, 999))
        assert layer.input_quantizer.bits == 8 and len(values.unique()) <= 256
    table = "entropy_bottleneck._quantized_cdf"
    assert torch.equal(quantized.state_dict()[table], before[table])


@pytest.mark.slow
def test_sixteen_bits_are_next_to_float_and_fewer_are_worse(examples):
    model, x = random_model(), photo(examples, 0)
    reference = model(x[None] / 255)["x_hat"]
    errors = [
        (quantize(model, [x], bits, bits, ranges="minmax")(x[None] / 255)["x_hat"] - reference).square().mean().sqrt().item()
        for bits in (16, 8, 4)
    ]
    spread = reference.std().item()
    assert errors[0] < 1e-3 * spread < errors[1] < errors[2]
    halves = quantize(model, [x], 4, 4, ranges="mse", weight_ranges="minmax").state_dict()
    whole = quantize(model, [x], 4, 4, ranges="mse").state_dict(), quantize(model, [x], 4, 4, ranges="minmax").state_dict()
    assert torch.equal(halves["g_a.0.weight"], whole[1]["g_a.0.weight"])
    assert torch.equal(halves["g_a.2.input_quantizer.scale"], whole[0]["g_a.2.input_quantizer.scale"])
    unchanged = quantize(model, [x], 32, 32)
    assert torch.equal(unchanged(x[None] / 255)["x_hat"], reference)


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["nearest", "adaround"])
def test_the_same_arguments_give_the_same_model(rounding, examples):
    model, images = random_model(), [photo(examples, 0), photo(examples, 1)]
    first, second = (quantize(model, images, 4, 8, rounding, "percentile", seed=3, iterations=5).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_adaround_reconstructs_better_than_nearest(examples):
    """In the model, too, with the layers before quantised: a layer's output on photographs that it was not calibrated on."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, 8, 5, 2, 2), nn.ReLU(), nn.ConvTranspose2d(8, 6, 4, 2)
    )
    images = [photo(examples, i, 64, 64)[None] / 255 for i in range(6)]
    target = [model(x) for x in images[3:]]
    error = {}
    for rounding in ("nearest", "adaround"):
        quantized = quantize_module(model, images[:3], 3, 8, rounding, iterations=200)
        error[rounding] = sum((quantized(x) - y).square().mean().item() for x, y in zip(images[3:], target))
    assert error["adaround"] < 0.7 * error["nearest"]


def test_context_models_inputs(examples):
    """Raster-scan: CompressAI's coder bypasses the layer, so its input stays float; checkerboard: the layer is called."""
    quantized = quantize(random_model("mbt2018"), [photo(examples, 0, 64, 64)], 8, 8)
    assert not hasattr(quantized.context_prediction, "input_quantizer")
    assert (channel_weights(quantized.context_prediction)[:, :].count_nonzero() > 0).item()
    assert hasattr(quantized.entropy_parameters[0], "input_quantizer")
    checkerboard = nn.Sequential(CheckerboardMaskedConv2d(3, 4, 5, padding=2))
    quantized = quantize_module(checkerboard, [photo(examples, 0, 64, 64)[None] / 255], 8, 8, "adaround", iterations=5)
    assert hasattr(quantized[0], "input_quantizer")
    assert (quantized[0].weight[quantized[0].mask == 0] == 0).all()


def test_layers_that_are_not_called(examples):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.used(x)

    quantized = quantize_module(Spare(), [torch.rand(1, 3, 8, 8)], 4, 8, "adaround", iterations=2)
    assert quantized.used.input_quantizer.bits == 8 and not hasattr(quantized.spare, "input_quantizer")
    assert len(quantized.spare.weight[0].unique()) <= 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 1}, "weight_bits is 1"),
        ({"activation_bits": 17}, "activation_bits is 17"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"ranges": "max"}, "ranges is 'max'"),
        ({"weight_ranges": "max"}, "weight_ranges is 'max'"),
        ({"percentile": 50}, "percentile is 50"),
        ({"inputs": []}, "inputs is empty"),
        ({"model": nn.ReLU()}, "ReLU has no layer"),
        ({"inputs": [torch.full((1, 3, 8, 8), float("nan"))]}, "the input of 0 is not finite"),
        ({"model": nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))}, "computes its weight"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    good = {"model": nn.Sequential(nn.Conv2d(3, 4, 3)), "inputs": [torch.rand(1, 3, 8, 8)], "weight_bits": 8}
    with pytest.raises(ValueError, match=message):
        quantize_module(**(good | {"activation_bits": 8} | arguments))


def test_weights_that_are_not_finite():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].weight.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="the weights of 0 are not finite"):
        quantize_module(model, [torch.rand(1, 3, 8, 8)], 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "mbt2018"])
@torch.no_grad()
def test_the_decoder_has_the_encoders_latent(name, weight_bits, examples, monkeypatch):
    """Through real bytes: y_hat as the encoder rounded it is, to the bit, what the decoder gives to its synthesis."""
    quantized = quantize(random_model(name), [photo(examples, 0)], weight_bits, 6)
    encoded, decoded = [], []
    x = photo(examples, 1)[None] / 255
    if name == "mbt2018":
        compress = type(quantized)._compress_ar

        def keep(self, y_hat, *args):
            string = compress(self, y_hat, *args)
            encoded.append(y_hat[..., 2:-2, 2:-2].clone())  # written in place, in a border of 2
            return string

        monkeypatch.setattr(type(quantized), "_compress_ar", keep)
    else:
        encoded.append(quantized.gaussian_conditional.quantize(quantized.g_a(x), "dequantize"))
    code = quantized.compress(x)
    handle = quantized.g_s.register_forward_pre_hook(lambda _, args: decoded.append(args[0].clone()))
    quantized.decompress(code["strings"], code["shape"])
    handle.remove()
    assert len(encoded[0].unique()) > 2
    assert torch.equal(encoded[0], decoded[0])
    result, _ = code_image(quantized, photo(examples, 1))
    assert abs(result["bpp"] / result["bpp-estimated"] - 1) < 0.2
    if name != "mbt2018":
        assert result["psnr-rgb"] == pytest.approx(result["psnr-forward"], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "in_float"), [("cheng2020-attn", ["context_prediction"]), ("elic2022-official", [])])
def test_larger_models(name, in_float, examples):
    """Attention, sub-pixel convolutions, channel groups and checkerboards: every layer is quantised, and the codes decode."""
    torch.manual_seed(0)
    model = build_model(name, {"N": 8} | ({"M": 40} if name.startswith("elic") else {})).eval()
    quantized = quantize(model, [photo(examples, 0)], 8, 8)
    layers = lic_quantization.quantizable_layers(quantized)
    assert [name for name, layer in layers.items() if not hasattr(layer, "input_quantizer")] == in_float
    result, _ = code_image(quantized, photo(examples, 1))
    assert result["psnr-rgb"] == pytest.approx(result["psnr-forward"], abs=0.5 if in_float else 0.01)


# -------------------------------------------------------------------------------------------------------------- BD-rate


def points(factor: float = 1.0) -> list[tuple[float, float]]:
    return [(factor * rate, psnr) for rate, psnr in [(0.2, 26.0), (0.4, 28.5), (0.8, 31.2), (1.5, 34.0)]]


def save_checkpoint(path: Path, lmbda: float = 0.013, seed: int = 0, optimizer: str = "soap") -> Path:
    """As train_lic.py writes it, with random weights; what quantisation does not read is left out."""
    path.mkdir(parents=True)
    options = {
        "model": "bmshj2018-hyperprior",
        "widths": TINY,
        "lmbda": lmbda,
        "metric": "mse",
        "optimizer": optimizer,
        "seed": 0,
    }
    state = {"state_dict": random_model(seed=seed).state_dict(), "options": options, "optimizer_name": optimizer}
    torch.save(state | {"history": [], "step": 7}, path / "checkpoint.pth.tar")
    return path


def test_curves_are_of_one_recipe(tmp_path):
    """Four lambdas of one optimizer make a curve; three of another do not."""
    lambdas = [("soap", x) for x in (1, 2, 3, 4)] + [("adam", x) for x in (1, 2, 3)]
    models, rows = [], []
    for optimizer, lmbda in lambdas:
        name = f"{optimizer}-{lmbda}"
        path = save_checkpoint(tmp_path / name, lmbda, optimizer=optimizer)
        models.append((quantize_lic.load_trained(path / "checkpoint.pth.tar"), None))
        for rounding, factor in (("float", 1.0), ("nearest", 1.2)):
            bpp, psnr = points(factor)[lmbda - 1]
            rows.append({"checkpoint": name, "lambda": lmbda, "weight_bits": 8, "activation_bits": 8, "rounding": rounding,
                         "ranges": "mse", "weight_ranges": "mse", "bpp": bpp, "psnr": psnr})  # fmt: skip
    curves = quantize_lic.bd_rates(models, rows)
    assert [(curve["curve"], curve["setting"]) for curve in curves] == [("soap", "float"), ("soap", "W8A8 nearest, mse")]
    assert [curve["bd_rate_percent"] for curve in curves] == pytest.approx([0, 20], abs=1e-6)
    assert curves[1]["points"] == points(1.2)


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: CHECKPOINT"),
        (["nothing.pth.tar"], "cannot read the checkpoint nothing.pth.tar"),
        (["RUN", "--bits", "8"], "8 is not WEIGHTS/ACTIVATIONS"),
        (["RUN", "--bits", "8/1"], "8/1 is not WEIGHTS/ACTIVATIONS"),
        (["RUN", "--rounding", "up"], "invalid choice: 'up'"),
        (["RUN", "--percentile", "101"], "101 is not above 50 and at most 100"),
        (["RUN", "--calibration", "0"], "--calibration 0: there are 1 to 95"),
        (["RUN", "--calibration", "nowhere"], "--calibration nowhere is not a folder"),
        (["RUN", "--images", "."], "--images: no images below"),
        (["RUN", "RUN"], "a checkpoint is given twice"),
        (["RUN", "--save", "file"], "--save file"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    if "RUN" in arguments:
        save_checkpoint(tmp_path / "RUN")
    with pytest.raises(SystemExit) as stopped:
        quantize_lic.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_names_tell_checkpoints_apart(tmp_path):
    class At:
        def __init__(self, path):
            self.path = tmp_path / path

    models = [
        At("a/run/checkpoint.pth.tar"),
        At("b/run/checkpoint.pth.tar"),
        At("b/other/best.pth.tar"),
        At("c/checkpoint.pth.tar"),
    ]
    assert [quantize_lic.checkpoint_name(m, models) for m in models] == ["a/run", "b/run", "best.pth.tar", "c"]


def test_lambda_of_bare_weights(tmp_path):
    path = tmp_path / "weights.pth.tar"
    torch.save(random_model().state_dict(), path)
    trained = quantize_lic.load_trained(path, "bmshj2018-hyperprior")
    with pytest.raises(InputError, match="give --lambda"):
        quantize_lic.loss_of(trained, None)
    assert quantize_lic.loss_of(trained, 0.05).lmbda == 0.05


@pytest.mark.slow
def test_the_command_and_its_resumption(tmp_path, photos, monkeypatch, capsys):
    runs = [str(save_checkpoint(tmp_path / f"run{i}", lmbda, i)) for i, lmbda in enumerate((0.01, 0.02, 0.03, 0.04))]
    command = [*runs, "--bits", "8/8", "4/32", "--ranges", "mse", "minmax", "--adaround-iterations", "3", "--calibration", "2",
               "--calibration-crop", "64", "--images", str(photos / "test"), "--eval-crop", "64", "128",
               "--save", str(tmp_path / "ptq")]  # fmt: skip
    original, calls = lic_quantization.quantize, itertools.count(1)

    def dies(*args, **kwargs):
        if next(calls) > 9:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(quantize_lic, "quantize", dies)
    assert quantize_lic.main(command) == 130
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "ptq" / "results").iterdir()}
    assert len(done) == 1 + 8 + 1 + 1 and not (tmp_path / "ptq" / "ptq.csv").exists()

    calls = itertools.count(-1000)
    assert quantize_lic.main(command) == 0
    assert next(calls) == -1000 + 4 * 8 - 9  # only what was left
    assert all(file.stat().st_mtime_ns == time for file, time in done.items())
    with (tmp_path / "ptq" / "ptq.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 9
    for row in rows:
        assert row["checkpoint"].startswith("run") and row["model"] == "bmshj2018-hyperprior" and row["step"] == "7"
        assert float(row["bpp"]) > 0 and float(row["bpp"]) == pytest.approx(float(row["bpp_estimated_coded"]), abs=0.02)
        if row["rounding"] == "float":
            assert float(row["loss_increase_percent"]) == float(row["psnr_change"]) == 0
    data = json.loads((tmp_path / "ptq" / "ptq.json").read_text())
    assert [row["loss"] for row in data["rows"]] == [float(row["loss"]) for row in rows]
    assert len(data["bd_rates"]) == 9
    text = (tmp_path / "ptq" / "ptq.md").read_text()
    flat = re.sub(r" +", " ", text)
    assert "| run3 | 0.04 | W8A8 AdaRound, minmax |" in flat and text in capsys.readouterr().out
    assert Image.open(tmp_path / "ptq" / "ptq.png").size[0] > 1500

    monkeypatch.setattr(quantize_lic, "quantize", dies)
    calls = itertools.count(0)
    assert quantize_lic.main([*command, "--seed", "1", "--bits", "8/8", "--rounding", "nearest", "--ranges", "mse"]) == 0
    assert next(calls) == 4  # another seed is another result
