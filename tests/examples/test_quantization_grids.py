"""The grids' mathematics, what a layer's weights meet, and AdaRound of one layer."""

import pytest
import torch
from compressai.layers import GDN, MaskedConv2d
from lic_adaround import Reconstruction, adaround, patches, reconstruction
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
from lic_quantization import InputQuantizer
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
    pytest.mark.usefixtures("few_samples"),
]

RANGES = ("minmax", "percentile", "mse")


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
