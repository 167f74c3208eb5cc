"""Post-training quantisation (PTQ) of a trained model: ranges from calibration images, rounding to nearest or AdaRound.

What is quantised: the weights of Conv2d, ConvTranspose2d and Linear per output channel, on a symmetric signed grid; gamma of
GDN per output channel, on a grid from 0, since it is never negative; and the input of each of these layers per tensor, on an
asymmetric grid that has an exact 0. Biases, GDN's beta and its product and square root stay in float32 (hardware has wide
accumulators for them), and so do the entropy models, which are tables. GDN is treated as a layer with gamma for its weights
as in the code of Shi et al., "Rate-Distortion Optimized Post-Training Quantization for Learned Image Compression", arXiv
2211.02854.

All of it is simulated: every number is rounded to its grid and kept in float32 ("fake quantisation"), so rates and
distortions are those of integer arithmetic with exact accumulators, and speed and memory are not.

Encoder and decoder agree because both run the one quantised model: whatever decides the entropy coder's tables (h_s, and the
context model) is computed from the same decoded symbols by the same operations. One input is left in float32: that of a
raster-scan context model (MaskedConv2d), whose coder in CompressAI applies the layer's weights to windows of y itself and
never calls the layer.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from compressai.layers import GDN, CheckerboardMaskedConv2d, MaskedConv2d
from compressai.models import CompressionModel
from compressai.ops import compute_padding
from lic_evaluation import to_float
from lic_models import downsampling_factor
from torch import Tensor, nn
from tqdm import tqdm

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, GDN)
ROUNDINGS = ("nearest", "adaround")
RANGES = ("minmax", "percentile", "mse")
FLOAT = 32  # bits: leave these numbers as they are
PERCENTILE = 99.99

FRACTIONS = torch.arange(1, 101) / 100  # of the largest range, which the search for the least squared error tries
SAMPLES = 1 << 16  # values of a layer's input kept for its range, beside its exact minimum and maximum
POSITIONS = 1 << 14  # output positions of a layer that AdaRound reconstructs
TINY = torch.finfo(torch.float32).tiny  # the smallest step whose reciprocal is finite

# Nagel et al. 2020, arXiv 2004.10568, section 3: the rectified sigmoid's stretch, and the exponent's annealing.
GAMMA, ZETA = -0.1, 1.1
BETA_FIRST, BETA_LAST = 20.0, 2.0
WARM_UP = 0.2  # of the iterations without the regulariser
REGULARISER = 0.3  # against a reconstruction error of 1 = that of rounding to nearest
ITERATIONS = 600
STEP_SIZE = 0.02  # of Adam; from the middle, 0.5, to either end h takes V some 120 such steps


# ---------------------------------------------------------------------------------------------------------------- grids


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


class InputQuantizer(nn.Module):
    """Rounds a layer's input to the grid (x / scale + zero_point in 0 .. 2^bits - 1) and back."""

    def __init__(self, scale: float, zero_point: int, bits: int):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32))
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        limits = integer_limits(self.bits, signed=False)
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *limits)


def quantize_input(layer: nn.Module, args: tuple) -> tuple:
    """The layers' forward pre-hook."""
    return layer.input_quantizer(args[0]), *args[1:]


# ------------------------------------------------------------------------------------------------------- layers' weights


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights and inputs are quantised, by name.

    Raises:
        ValueError: one of them does not keep its weight as a parameter (CompressAI's SpectralConv2d, weight_norm).
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    for name, layer in layers.items():
        if ("gamma" if isinstance(layer, GDN) else "weight") not in layer._parameters:
            raise ValueError(f"{name} ({type(layer).__name__}) computes its weight from others; such layers are not supported")
    return layers


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


# --------------------------------------------------------------------------------------------------------- calibration


@dataclass
class InputStatistics:
    """What a layer's input held over the calibration images."""

    low: float = float("inf")
    high: float = float("-inf")
    samples: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, count: int, generator: torch.Generator) -> None:
        x = x.detach().flatten()
        self.low, self.high = min(self.low, x.min().item()), max(self.high, x.max().item())
        self.samples.append(x[torch.randint(len(x), (min(count, len(x)),), generator=generator)])

    def values(self) -> Tensor:
        return torch.cat([*self.samples, torch.tensor([self.low, self.high])])


@torch.no_grad()
def calibrate(model: nn.Module, inputs: list[Tensor], seed: int = 0) -> dict[str, InputStatistics]:
    """The statistics of every quantisable layer's input, in the order of the layers' first calls; of those that are called.

    Raises:
        ValueError: a layer's input is not finite.
    """
    statistics: dict[str, InputStatistics] = {}
    generator = torch.Generator().manual_seed(seed)

    def note(name: str):
        def hook(_layer, args):
            if not args[0].isfinite().all():
                raise ValueError(f"the input of {name} is not finite on the calibration images")
            statistics.setdefault(name, InputStatistics()).add(args[0], -(-SAMPLES // len(inputs)), generator)

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in quantizable_layers(model).items()]
    try:
        for x in inputs:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return statistics


class _Reached(Exception):
    """The layer whose input was asked for has had it: the rest of the model need not run."""


@torch.no_grad()
def layer_inputs(model: nn.Module, name: str, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """What the layer called `name` is given for each of the model's inputs, as it uses it (quantised if it quantises); of a
    layer that is called more than once, the first."""
    layer = model.get_submodule(name)

    def hook(_layer, args):
        raise _Reached(args[0])

    for x in inputs:
        handle = layer.register_forward_pre_hook(hook)  # after the quantiser's, which was registered before
        try:
            model(x)
        except _Reached as reached:
            yield reached.args[0]
        finally:
            handle.remove()


# ------------------------------------------------------------------------------------------------------------ AdaRound


def patches(layer: nn.Module, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """What the layer's weights meet at up to `count` random positions of its output.

    Args:
        layer: Conv2d, ConvTranspose2d or Linear.
        x: its input, [B, C, H, W], or [.., n] for Linear.

    Returns:
        [count, groups, n]: its output there, without the bias, is einsum("pgn,gcn->pgc", patches, channel_weights per group).
    """
    if isinstance(layer, nn.Linear):
        x = x.flatten(0, -2)
        return x[torch.randint(len(x), (count,), generator=generator)][:, None]
    if not isinstance(layer, nn.ConvTranspose2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0, 0)
    else:
        padding = layer.padding

    indices, valid = [], []
    for axis in (0, 1):
        size, kernel, stride, dilation, pad = (
            x.shape[2 + axis], layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis], padding[axis]
        )  # fmt: skip
        k = dilation * torch.arange(kernel)  # [kernel]
        if isinstance(layer, nn.ConvTranspose2d):
            outputs = (size - 1) * stride - 2 * pad + dilation * (kernel - 1) + layer.output_padding[axis] + 1
            shifted = torch.randint(outputs, (count, 1), generator=generator) + pad - k  # [count, kernel]
            index, fits = shifted.div(stride, rounding_mode="floor"), shifted % stride == 0
        else:
            outputs = (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            index = torch.randint(outputs, (count, 1), generator=generator) * stride - pad + k
            fits = torch.ones_like(index, dtype=torch.bool)
        valid.append(fits & (index >= 0) & (index < size))
        indices.append(index.clamp(0, size - 1))
    image = torch.randint(len(x), (count, 1, 1), generator=generator)
    seen = x[image, :, indices[0][:, :, None], indices[1][:, None, :]]  # [count, kh, kw, C]
    seen = seen * (valid[0][:, :, None] & valid[1][:, None, :])[..., None]
    return seen.permute(0, 3, 1, 2).reshape(count, groups(layer), -1)


@dataclass
class Reconstruction:
    """The squared error of a layer's output as a quadratic form of what rounding adds to its weights.

    With X the layer's input in the float model and X' in the quantised one, W its weights and D what is added to them, the
    mean squared error of output channel c is E (W_c X - (W_c + D_c) X')^2 = D_c H D_c^T - 2 D_c g_c + r_c. So an iteration of
    AdaRound costs one product with H, however many calibration images there are, and always sees all of them.

    Attributes:
        hessian: H = E X' X'^T, [groups, n, n].
        slope: g = E (W X - W X') X', [groups, C / groups, n].
        rest: r = E (W X - W X')^2, [groups, C / groups].
    """

    hessian: Tensor
    slope: Tensor
    rest: Tensor

    def error(self, added: Tensor) -> Tensor:
        """[C]: the mean squared error of each output channel for `added` [C, n]."""
        added = added.view_as(self.slope)
        return ((added @ self.hessian - 2 * self.slope) * added).sum(-1).add(self.rest).clamp_min(0).flatten()


def reconstruction(layer: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], count: int, seed: int) -> Reconstruction:
    """Of `layer` (its float weights) over pairs of its inputs in the float and in the quantised model: `count` positions of
    each pair."""
    weight = channel_weights(layer).unflatten(0, (groups(layer), -1))  # [groups, C / groups, n]
    hessian, slope, rest, total = 0, 0, 0, 0
    for i, (x, quantized) in enumerate(pairs):
        before, after = (  # [groups, count, n] each, at the same positions
            patches(layer, y, count, torch.Generator().manual_seed(seed + i)).transpose(0, 1) for y in (x, quantized)
        )
        residual = (before - after) @ weight.mT  # [groups, count, C / groups]
        hessian = hessian + after.mT @ after
        slope = slope + residual.mT @ after
        rest = rest + residual.square().sum(1)
        total += count
    return Reconstruction(hessian / total, slope / total, rest / total)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), arXiv 2004.10568, equation 23."""
    return (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def adaround(
    weight: Tensor, scale: Tensor, bits: int, target: Reconstruction, iterations: int = ITERATIONS, signed: bool = True
) -> Tensor:
    """AdaRound (Nagel et al. 2020, arXiv 2004.10568): each weight goes up or down, whichever reconstructs the layer's output.

    Minimises, by Adam over V, the error of the weights scale (floor(W / scale) + h(V)) + lambda sum (1 - |2 h(V) - 1|^beta)
    (equations 21 to 25) with beta going down from 20 to 2. Each channel's error is divided by that of rounding to nearest, so
    that lambda means the same in every layer. Where V ends above 0 a weight is rounded up. A channel that rounding to nearest
    reconstructs better (which calibration on few images does see) keeps that.

    Args:
        weight: [C, n], as channel_weights has it.
        scale: [C, 1].

    Returns:
        The rounded weights, [C, n]; the same for the same arguments.
    """
    low, high = integer_limits(bits, signed)
    nearest = on_grid(weight, scale, bits, signed)
    nearest_error = target.error(nearest - weight)  # [C]
    floor = (weight / scale).floor()
    fraction = (weight / scale - floor).clamp(0.01, 0.99)  # away from where h has no slope
    v = torch.logit((fraction - GAMMA) / (ZETA - GAMMA)).requires_grad_()
    unit = (1 / nearest_error.clamp_min(TINY)).where(nearest_error > 0, torch.zeros(()))[:, None] / len(weight)
    optimizer = torch.optim.Adam([v], lr=STEP_SIZE)
    start = int(WARM_UP * iterations)
    for i in range(iterations):
        h = rectified_sigmoid(v)
        added = (floor + h).clamp(low, high) * scale - weight  # [C, n]
        with torch.no_grad():  # the quadratic form's gradient; autograd would multiply with H a second time
            shaped = added.view_as(target.slope)
            gradient = 2 * (shaped @ target.hessian - target.slope).view_as(added) * unit
        loss = (added * gradient).sum()
        if i >= start:
            progress = (i - start) / max(1, iterations - start)
            beta = BETA_LAST + (BETA_FIRST - BETA_LAST) * (1 - progress)
            loss = loss + REGULARISER / len(weight) * (1 - (2 * h - 1).abs().pow(beta)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rounded = (floor + (rectified_sigmoid(v.detach()) >= 0.5)).clamp(low, high) * scale
    better = target.error(rounded - weight) < nearest_error
    return torch.where(better[:, None], rounded, nearest)


# ---------------------------------------------------------------------------------------------------------- the models


def quantize_module(
    model: nn.Module,
    inputs: list[Tensor],
    weight_bits: int,
    activation_bits: int,
    rounding: str = "nearest",
    ranges: str = "mse",
    seed: int = 0,
    *,
    weight_ranges: str | None = None,
    percentile: float = PERCENTILE,
    iterations: int = ITERATIONS,
    progress: bool = False,
) -> nn.Module:
    """A quantised copy of any module, in evaluation mode; `model` itself is not changed.

    Each quantised layer of the copy has its rounded weights in place, their step per output channel as the buffer
    `weight_scale` [C, 1], and its input's quantiser as the submodule `input_quantizer`, applied by a forward pre-hook. A layer
    that `model` never calls for these inputs has its weights rounded to nearest and its input left alone. AdaRound is for
    convolutions and linear layers, one after the other in the order in which they are called; the gammas of GDN, which its
    layer-wise objective is not quadratic in, are rounded to nearest.

    Args:
        model: on the CPU or wherever `inputs` are; evaluation is deterministic.
        inputs: what to call it with, to set the ranges of activations and for AdaRound.
        weight_bits, activation_bits: 2 to 16, or 32 for float.
        rounding: "nearest" or "adaround", of the weights.
        ranges: "minmax", "percentile" or "mse", of weights and activations; the float model's activations set theirs.
        seed: of the sampled activations.
        weight_ranges: of the weights alone; None, the same as `ranges`.
        percentile: for ranges "percentile", in (50, 100].
        iterations: of AdaRound, for each layer.
        progress: show a bar.

    Raises:
        ValueError: an argument is out of range, nothing can be quantised, or weights or activations are not finite.
    """
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if not (2 <= bits <= 16 or bits == FLOAT):
            raise ValueError(f"{name} is {bits}: 2 to 16, or {FLOAT} for float")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}: one of {', '.join(ROUNDINGS)}")
    weight_ranges = ranges if weight_ranges is None else weight_ranges
    for name, value in (("ranges", ranges), ("weight_ranges", weight_ranges)):
        if value not in RANGES:
            raise ValueError(f"{name} is {value!r}: one of {', '.join(RANGES)}")
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}: above 50, at most 100")
    if not inputs:
        raise ValueError("inputs is empty: there is nothing to calibrate with")

    reference = copy.deepcopy(model).eval().requires_grad_(False)
    quantized = copy.deepcopy(reference)
    layers = quantizable_layers(quantized)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer that can be quantised")
    for name, layer in layers.items():
        if not channel_weights(layer).isfinite().all():
            raise ValueError(f"the weights of {name} are not finite")
    statistics = calibrate(reference, inputs, seed)

    called = [name for name in statistics if name in layers]
    order = called + [name for name in layers if name not in statistics]
    for i, name in enumerate(
        tqdm(order, desc=f"quantising, {rounding}", unit="layer", disable=None if progress else True, leave=False)
    ):
        layer = layers[name]
        raster_scan = isinstance(layer, MaskedConv2d) and not isinstance(layer, CheckerboardMaskedConv2d)
        if activation_bits != FLOAT and name in statistics and not raster_scan:
            low, high = activation_range(statistics[name].values(), activation_bits, ranges, percentile)
            layer.input_quantizer = InputQuantizer(*activation_grid(low, high, activation_bits), activation_bits)
            layer.register_forward_pre_hook(quantize_input)
        if weight_bits == FLOAT:
            continue
        weight = channel_weights(layer)
        scale = weight_scale(weight, weight_bits, signed(layer), weight_ranges, percentile)
        if rounding == "adaround" and name in statistics and not isinstance(layer, GDN):
            pairs = zip(layer_inputs(reference, name, inputs), layer_inputs(quantized, name, inputs))
            target = reconstruction(layer, pairs, -(-POSITIONS // len(inputs)), seed=seed + i * len(inputs))
            rounded = adaround(weight, scale, weight_bits, target, iterations)
        else:
            rounded = on_grid(weight, scale, weight_bits, signed(layer))
        set_channel_weights(layer, rounded)
        layer.register_buffer("weight_scale", scale)
    return quantized


def quantize(
    model: CompressionModel,
    calibration_images: list[Tensor],
    weight_bits: int,
    activation_bits: int,
    rounding: str = "nearest",
    ranges: str = "mse",
    seed: int = 0,
    **options,
) -> CompressionModel:
    """A quantised copy of a compression model, calibrated on images (uint8 [3, H, W], of any size), ready to code with.

    The other arguments, and the errors, are quantize_module's. The entropy coder's tables come from the entropy models, which
    quantisation leaves alone, and are the float model's.
    """
    device = next(model.parameters()).device
    inputs = []
    for image in calibration_images:
        x = to_float(image, device)[None]
        inputs.append(F.pad(x, compute_padding(*x.shape[-2:], min_div=downsampling_factor(model))[0]))
    quantized = quantize_module(model, inputs, weight_bits, activation_bits, rounding, ranges, seed, **options)
    quantized.update(force=True)
    return quantized
