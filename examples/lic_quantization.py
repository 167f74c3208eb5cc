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
from lic_adaround import ITERATIONS, POSITIONS, adaround, reconstruction
from lic_evaluation import to_float
from lic_grids import (
    FLOAT,
    PERCENTILE,
    RANGES,
    activation_grid,
    activation_range,
    channel_weights,
    integer_limits,
    on_grid,
    set_channel_weights,
    signed,
    weight_scale,
)
from lic_models import downsampling_factor
from torch import Tensor, nn
from tqdm import tqdm

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, GDN)
ROUNDINGS = ("nearest", "adaround")

SAMPLES = 1 << 16  # values of a layer's input kept for its range, beside its exact minimum and maximum


# ---------------------------------------------------------------------------------------------------------------- grids


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


# ---------------------------------------------------------------------------------------------------------- the models


def check_settings(
    weight_bits: int, activation_bits: int, rounding: str, ranges: str, weight_ranges: str, percentile: float
) -> None:
    """Raise ValueError where one of quantize_module's arguments is out of range."""
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if not (2 <= bits <= 16 or bits == FLOAT):
            raise ValueError(f"{name} is {bits}: 2 to 16, or {FLOAT} for float")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}: one of {', '.join(ROUNDINGS)}")
    for name, value in (("ranges", ranges), ("weight_ranges", weight_ranges)):
        if value not in RANGES:
            raise ValueError(f"{name} is {value!r}: one of {', '.join(RANGES)}")
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}: above 50, at most 100")


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
    weight_ranges = ranges if weight_ranges is None else weight_ranges
    check_settings(weight_bits, activation_bits, rounding, ranges, weight_ranges, percentile)
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
