"""The grids of integers that numbers are rounded to, and a layer's weights as rows, one for each output channel."""

import torch
from compressai.layers import GDN, MaskedConv2d
from torch import Tensor, nn

RANGES = ("minmax", "percentile", "mse")
FLOAT = 32  # bits: leave these numbers as they are
PERCENTILE = 99.99
FRACTIONS = torch.arange(1, 101) / 100  # of the largest range, which the search for the least squared error tries
TINY = torch.finfo(torch.float32).tiny  # the smallest step whose reciprocal is finite


def integer_limits(bits: int, signed: bool) -> tuple[int, int]:
    """The grid's least and greatest integer: -8 .. 7 or 0 .. 15 for 4 bits."""
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


def on_grid(weight: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """weight [C, n] rounded to the nearest multiples of scale [C, 1] that `bits` can hold."""
    return (weight / scale).round().clamp(*integer_limits(bits, signed)) * scale


def weight_scale(weight: Tensor, bits: int, signed: bool, ranges: str = "mse", percentile: float = PERCENTILE) -> Tensor:
    """The step of each channel's grid.

    Args:
        weight: [C, n], a row for each output channel.
        ranges: the largest magnitude that the grid holds: "minmax", the channel's own; "percentile", that of its magnitudes
            (interpolated, as torch.quantile does); "mse", the fraction of minmax with the least squared rounding error.

    Returns:
        [C, 1], above 0; 1 for a channel of zeros.
    """
    top = integer_limits(bits, signed)[1]
    largest = weight.abs().amax(1, keepdim=True)
    if ranges == "percentile":
        # (A channel that is zero but for a few weights must not lose them all.)
        quantile = weight.abs().quantile(percentile / 100, dim=1, keepdim=True)
        limit = torch.where(quantile > 0, quantile, largest)
    else:
        limit = largest
    scale = (limit / top).clamp_min(TINY)
    if ranges == "mse":
        candidates = [(scale * fraction).clamp_min(TINY) for fraction in FRACTIONS.to(weight)]
        errors = [(on_grid(weight, candidate, bits, signed) - weight).square().sum(1) for candidate in candidates]
        best = torch.stack(errors).argmin(0)  # [C]
        scale = torch.stack(candidates)[best, torch.arange(len(best))]
    return torch.where(largest > 0, scale, torch.ones_like(scale))


def activation_grid(low: float, high: float, bits: int) -> tuple[float, int]:
    """Step and zero point of the grid over [low, high], widened to hold 0, which padding and dead units need exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    top = integer_limits(bits, signed=False)[1]
    scale = max((high - low) / top, TINY)
    return scale, min(top, max(0, round(-low / scale)))


def activation_range(values: Tensor, bits: int, ranges: str = "mse", percentile: float = PERCENTILE) -> tuple[float, float]:
    """The part of a tensor's values that its grid covers; the rest is clipped.

    Args:
        values: a sample of them, [n], with their minimum and maximum in it.
        ranges: "minmax", all of it; "percentile", without the same share at both ends; "mse", the least squared error of
            rounding and clipping: both ends drawn in together first, then each alone.
    """
    low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    if ranges == "percentile":
        share = percentile / 100
        ends = values.quantile(torch.tensor([1 - share, share], dtype=values.dtype))
        return min(ends[0].item(), 0.0), max(ends[1].item(), 0.0)
    if ranges == "minmax":
        return low, high

    def error(ends: tuple[float, float]) -> float:
        return (fake_quantize(values, *activation_grid(*ends, bits), bits) - values).square().sum().item()

    fractions = FRACTIONS.tolist()
    low, high = min(((low * f, high * f) for f in fractions), key=error)
    low, high = min(((low, high * f) for f in fractions), key=error)
    return min(((low * f, high) for f in fractions), key=error)


def fake_quantize(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *integer_limits(bits, signed=False))


def signed(layer: nn.Module) -> bool:
    return not isinstance(layer, GDN)


def groups(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)


def channel_weights(layer: nn.Module) -> Tensor:
    """What the layer multiplies its input with, as [C, n]: a row for each output channel, masked or reparametrised as its
    forward does. For n the input channels of the channel's group come first, then the kernel's rows and columns."""
    with torch.no_grad():
        if isinstance(layer, GDN):
            return layer.gamma_reparam(layer.gamma)
        weight = layer.weight * layer.mask if isinstance(layer, MaskedConv2d) else layer.weight
        if isinstance(layer, nn.ConvTranspose2d):  # [in, out / groups, kh, kw]
            weight = weight.unflatten(0, (groups(layer), -1)).transpose(1, 2).flatten(0, 1)
        return weight.detach().flatten(1).clone()


def set_channel_weights(layer: nn.Module, weight: Tensor) -> None:
    """The inverse of channel_weights."""
    with torch.no_grad():
        if isinstance(layer, GDN):
            # What the reparametrisation maps to these values, to within float32.
            layer.gamma.copy_((weight + layer.gamma_reparam.pedestal).sqrt())
            return
        if isinstance(layer, nn.ConvTranspose2d):
            kernel = layer.weight.shape[2:]
            weight = weight.unflatten(1, (-1, *kernel)).unflatten(0, (groups(layer), -1)).transpose(1, 2)
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if isinstance(layer, MaskedConv2d):
            layer.weight.mul_(layer.mask)
