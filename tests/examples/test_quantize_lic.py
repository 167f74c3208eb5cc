"""examples/quantize_lic.py and its quantiser: the grids' mathematics, AdaRound, coding with a quantised model, the command."""

import csv
import itertools
import json
import re
from pathlib import Path

import lic_quantization
import pytest
import quantize_lic
import torch
from compressai.layers import GDN, CheckerboardMaskedConv2d, MaskedConv2d
from lic_adaround import Reconstruction, adaround, patches, reconstruction
from lic_evaluation import code_image
from lic_files import InputError
from lic_grids import (
    activation_grid,
    activation_range,
    channel_weights,
    fake_quantize,
    integer_limits,
    on_grid,
    set_channel_weights,
    weight_scale,
)
from lic_images import centre_crop, read_image
from lic_models import build_model
from lic_quantization import InputQuantizer, calibrate, quantize, quantize_module
from PIL import Image
from torch import nn

RANGES = ("minmax", "percentile", "mse")
TINY = {"N": 8, "M": 12}

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """As many as models of this size need: what they cost here is the sampling."""
    monkeypatch.setattr(lic_quantization, "POSITIONS", 1024)
    monkeypatch.setattr(lic_quantization, "SAMPLES", 4096)


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


# ---------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_lie_on_their_grid(bits, ranges, signed):
    weight = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    weight = weight if signed else weight.abs()
    scale = weight_scale(weight, bits, signed, ranges)
    rounded = on_grid(weight, scale, bits, signed)
    steps = rounded / scale
    assert scale.shape == (5, 1)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    low, high = integer_limits(bits, signed)
    assert steps.min() > low - 0.5 and steps.max() < high + 0.5 and high - low == 2**bits - 1
    if ranges == "minmax":  # nothing is clipped
        assert ((rounded - weight).abs() <= scale * 0.5001).all()


def test_a_channels_range_is_its_own():
    weight = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    for ranges in RANGES:
        alone = weight_scale(weight, 6, True, ranges)
        louder = weight_scale(weight * torch.tensor([[1.0], [1024.0], [2.0**-10]]), 6, True, ranges)
        torch.testing.assert_close(louder, alone * torch.tensor([[1.0], [1024.0], [2.0**-10]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_channels_of_zeros_and_of_next_to_nothing(ranges, bits):
    weight = torch.zeros(4, 300)
    weight[1] = 1e-40  # subnormal
    weight[2, 0] = 1.0  # all but one are zero
    weight[3] = 1e30
    scale = weight_scale(weight, bits, True, ranges)
    rounded = on_grid(weight, scale, bits, True)
    assert (scale > 0).all() and rounded.isfinite().all() and (1 / scale).isfinite().all()
    assert (rounded[0] == 0).all() and rounded[2, 0] > 0.5 and (rounded[3] > 5e29).all()


def test_least_squared_error_is_at_most_minmaxs():
    """For weights and for activations, with outliers and without; with outliers at few bits it is far below."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 400, generator=generator)
    weight[3:, 0] = 12.0
    for bits in (3, 4, 8):
        errors = [
            (on_grid(weight, weight_scale(weight, bits, True, ranges), bits, True) - weight).square().sum(1)
            for ranges in ("mse", "minmax")
        ]
        assert (errors[0] <= errors[1] * 1.0001).all()
        for channel in weight:
            low, high = activation_range(channel, bits, "mse")
            error = (fake_quantize(channel, *activation_grid(low, high, bits), bits) - channel).square().sum()
            whole = activation_grid(channel.min().item(), channel.max().item(), bits)
            assert error <= (fake_quantize(channel, *whole, bits) - channel).square().sum() * 1.0001
        if bits == 3:
            assert (errors[0][3:] < 0.5 * errors[1][3:]).all()


def test_a_grid_reaches_to_zero():
    for low, high in ((5.0, 7.0), (-7.0, -5.0)):
        scale, zero_point = activation_grid(low, high, 8)
        x = torch.tensor([low, high, 0.0])
        torch.testing.assert_close(fake_quantize(x, scale, zero_point, 8), x, rtol=0, atol=scale * 0.51)
        assert fake_quantize(x, scale, zero_point, 8)[2] == 0


def test_percentile_leaves_out_the_outermost_values():
    values = torch.cat([torch.linspace(-1, 1, 9999), torch.tensor([50.0])])
    low, high = activation_range(values, 8, "percentile", percentile=99.9)
    assert -1 <= low < -0.99 and 0.99 < high < 1.01
    assert activation_range(values, 8, "minmax") == (-1.0, 50.0)


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-2.0, -2.0], [1e-42, 0.0], [-1.0, 3.0], [5.0, 7.0], [-7.0, -5.0]])
@pytest.mark.parametrize("ranges", RANGES)
def test_activations_that_are_constant_or_of_one_sign(values, ranges):
    """The grid has an exact 0, and a constant (a dead or saturated unit) is on it."""
    x = torch.tensor(values)
    scale, zero_point = activation_grid(*activation_range(x, 8, ranges), 8)
    assert 0 <= zero_point <= 255 and scale > 0
    layer = InputQuantizer(scale, zero_point, 8)
    assert layer(torch.zeros(1)).item() == 0
    assert layer(x).isfinite().all()
    if ranges != "percentile":  # (which interpolates between two values)
        torch.testing.assert_close(layer(x), x, rtol=0, atol=scale * 0.51)
    if len(set(values)) == 1:
        torch.testing.assert_close(layer(x), x, rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------------------------------- layers


def layers() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(3)
    x = torch.randn(2, 4, 9, 7)
    return {
        "stride": (nn.Conv2d(4, 6, 5, stride=2, padding=2), x),
        "dilation, not square": (nn.Conv2d(4, 6, (3, 2), padding=(2, 1), dilation=(2, 1)), x),
        "groups": (nn.Conv2d(4, 6, 3, groups=2), x),
        "same": (nn.Conv2d(4, 6, 4, padding="same"), x),
        "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), x),
        "masked": (MaskedConv2d(4, 6, 5, padding=2), x),
        "transposed": (nn.ConvTranspose2d(4, 6, 5, stride=2, padding=2, output_padding=1), x),
        "transposed, groups": (nn.ConvTranspose2d(4, 6, 3, stride=(3, 1), padding=1, groups=2, dilation=(1, 2)), x),
        "linear": (nn.Linear(7, 6), x),
        "GDN": (GDN(4), x),
        "inverse GDN": (GDN(4, inverse=True), x),
    }


@pytest.mark.parametrize("kind", layers())
@torch.no_grad()
def test_a_row_of_channel_weights_is_an_output_channel(kind):
    layer, x = layers()[kind]
    before = layer(x)
    weight = channel_weights(layer)
    set_channel_weights(layer, weight)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-6)  # (a square root and a square in GDN)
    if kind == "masked":  # (the decoder of a context model does not mask)
        set_channel_weights(layer, weight + 1)
        assert (layer.weight[layer.mask == 0] == 0).all()
    weight[2] *= 3
    set_channel_weights(layer, weight)
    channel_dim = -1 if kind == "linear" else 1
    changed = (layer(x) - before).abs().movedim(channel_dim, 0).flatten(1).amax(1) > 1e-3
    assert changed.tolist() == [i == 2 for i in range(len(weight))]


@pytest.mark.parametrize("kind", [kind for kind in layers() if "GDN" not in kind])
@torch.no_grad()
def test_patches_are_what_the_weights_meet(kind):
    """Each product of a patch with the weights is the layer's output at some position, and together they see most of them."""
    layer, x = layers()[kind]
    seen = patches(layer, x, 500, torch.Generator().manual_seed(0))  # [500, groups, n]
    weight = channel_weights(layer).unflatten(0, (seen.shape[1], -1))
    products = torch.einsum("pgn,gcn->pgc", seen, weight).flatten(1) + layer.bias  # [500, C]
    outputs = layer(x).movedim(-1 if kind == "linear" else 1, -1).flatten(0, -2)  # [positions, C]
    distance, position = (products[:, None] - outputs).abs().amax(-1).min(1)
    assert distance.max() < 1e-5
    assert len(position.unique()) > 0.5 * min(500, len(outputs))


# ------------------------------------------------------------------------------------------------------------- AdaRound


def layer_and_inputs(seed: int = 4):
    """A convolution, and correlated inputs as photographs' and features are; the quantised model's are a little off."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 24, 24, generator=generator)
    x = nn.functional.avg_pool2d(x, 5, 1, 2) + x.mean(1, keepdim=True)
    torch.manual_seed(seed)
    layer = nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    pairs = [(one[None], 0.95 * one[None] + 0.01 * torch.randn(one.shape, generator=generator)) for one in x]
    return layer, pairs


def test_the_quadratic_form_is_the_error():
    layer, pairs = layer_and_inputs()
    target = reconstruction(layer, pairs, 200, seed=0)
    weight = channel_weights(layer)
    added = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    direct = []
    for i, pair in enumerate(pairs):
        before, after = (patches(layer, y, 200, torch.Generator().manual_seed(i))[:, 0] for y in pair)
        direct.append((before @ weight.T - after @ (weight + added).T).square().mean(0))
    torch.testing.assert_close(target.error(added), torch.stack(direct).mean(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_adaround_is_never_worse_than_nearest_for_its_layer(bits):
    layer, pairs = layer_and_inputs()
    target = reconstruction(layer, pairs, 300, seed=0)
    weight = channel_weights(layer)
    scale = weight_scale(weight, bits, True)
    rounded = adaround(weight, scale, bits, target, iterations=300)
    nearest = on_grid(weight, scale, bits, True)
    errors = target.error(rounded - weight), target.error(nearest - weight)
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < (0.6 if bits == 4 else 1.0) * errors[1].sum()
    steps = rounded / scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    low, high = integer_limits(bits, True)
    assert steps.min() > low - 0.5 and steps.max() < high + 0.5
    within = (weight / scale > low) & (weight / scale < high)
    assert ((rounded - weight).abs()[within] < scale.expand_as(weight)[within] * 1.0001).all()  # up or down, no further
    assert torch.equal(rounded, adaround(weight, scale, bits, target, iterations=300))


def test_adaround_that_goes_astray_keeps_nearest():
    """With iterations that get nowhere, and an objective that nearest already has at zero."""
    layer, pairs = layer_and_inputs()
    weight = channel_weights(layer)
    scale = weight_scale(weight, 4, True)
    nearest = on_grid(weight, scale, 4, True)
    target = reconstruction(layer, pairs, 300, seed=0)
    for iterations in (0, 1, 3):
        assert (target.error(adaround(weight, scale, 4, target, iterations) - weight) <= target.error(nearest - weight)).all()
    zero = Reconstruction(torch.zeros(1, 36, 36), torch.zeros(1, 6, 36), torch.zeros(1, 6))
    assert torch.equal(adaround(weight, scale, 4, zero, 20), nearest)


def test_adaround_rounds_weights_of_dead_inputs_to_nearest():
    layer, pairs = layer_and_inputs()
    for x, quantized in pairs:
        x[:, 1] = quantized[:, 1] = 0
    weight = channel_weights(layer)
    scale = weight_scale(weight, 4, True)
    rounded = adaround(weight, scale, 4, reconstruction(layer, pairs, 300, seed=0), iterations=400)
    dead = slice(9, 18)  # input channel 1 of a 3 x 3 kernel
    off = (weight / scale - 0.5) % 1
    clear = (off - 0.5).abs()[:, dead] < 0.4  # (at the middle between two steps either is as good)
    assert torch.equal(rounded[:, dead][clear], on_grid(weight, scale, 4, True)[:, dead][clear])


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
