"""Outliers of activations and latents: what makes a model hard to quantise, layer by layer.

Outliers show in the kurtosis of a layer's outputs s_1, .., s_d:

    kurtosis = ((1/d) sum s^4) / ((1/d) sum s^2)^2.

It is 1 where all outputs have the same magnitude, 3 for normally distributed ones, and up to d where few outputs carry most of
the energy. It is taken of all values, or of the channels' root mean squares (arXiv 2405.19279; arXiv 2601.20769 for learned
image compression). Values are not centred: a quantiser's range has to hold the mean too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .table import Table

BIN_BITS = 16  # bits of a float32 inside a bin; 8 of the exponent and 7 of the mantissa number it
BINS = 1 << (31 - BIN_BITS)
SIGMAS = 6.0

COLUMNS = ("kurtosis_channels", "kurtosis", "max_over_median", "beyond_6_sigma")


def is_layer(module: nn.Module) -> bool:
    """Whether :class:`OutlierMeter` measures a module by default: convolutions and transposed convolutions of any dimension,
    Linear, and CompressAI's divisive normalisations (known by the name of their class, GDN or GDN1)."""
    return isinstance(module, (_ConvNd, nn.Linear)) or any(kind.__name__ in ("GDN", "GDN1") for kind in type(module).__mro__)


def channel_dim(module: nn.Module, x: Tensor) -> int:
    """The channel dimension of x, an output or input of a module: the one after the batch for convolutions (dim -3 for a 2-D
    convolution) and for other modules with 4-D or 5-D tensors; the last one for Linear, LayerNorm, attention, and others."""
    if isinstance(module, _ConvNd):
        return x.dim() - len(module.kernel_size) - 1
    if isinstance(module, (nn.Linear, nn.LayerNorm)) or x.dim() not in (4, 5):
        return x.dim() - 1
    return 1


class Moments:
    """Streaming statistics of tensors that come one by one, for :class:`OutlierMeter`.

    They are the sums of s^2 and of s^4, the sums of s^2 by channel, the largest |s|, and a histogram of |s| with bins that are
    1/256 to 1/128 of the value wide (float32 without its last 16 bits, 256 KiB).
    """

    def __init__(self) -> None:
        self.calls = self.count = self.not_finite = 0
        self.squares = self.fourths = self.largest = 0.0
        self.channel_squares: Tensor | None = None  # [C] float64
        self.channels_differ = False
        self.bins = torch.zeros(BINS, dtype=torch.int64)

    @torch.no_grad()
    def add(self, x: Tensor, dim: int) -> None:
        """Add the values of x (any shape, floating point). dim: its channel dimension."""
        self.calls += 1
        if not x.numel():
            return
        if x.device.type == "mps":  # MPS has no float64
            x = x.cpu()
        squared = x.detach().double().square()  # (not in place: double() of a float64 x is x itself)
        if not bool(squared.sum().isfinite()):
            finite = x.isfinite()
            self.not_finite += int((~finite).sum())
            x, squared = x.where(finite, 0), squared.where(finite, 0)
            self.count -= int((~finite).sum())
            self.bins[0] -= int((~finite).sum())
        self.count += x.numel()
        channels = squared.movedim(dim, 0).reshape(x.shape[dim], -1).sum(1) if x.dim() else squared.reshape(1)
        if self.channel_squares is None:
            with torch.inference_mode(False):  # a tensor made under inference mode could not be added to afterwards
                self.channel_squares = torch.zeros(len(channels), dtype=torch.float64)
        if len(channels) == len(self.channel_squares):
            self.channel_squares += channels.cpu()
        else:
            self.channels_differ = True
        self.squares += float(channels.sum())
        self.fourths += float(squared.square_().sum())
        del squared
        magnitudes = x.detach().abs().to(torch.float32).flatten()
        self.largest = max(self.largest, float(magnitudes.max()))
        self.bins += torch.bincount(magnitudes.view(torch.int32) >> BIN_BITS, minlength=BINS).cpu()

    def row(self) -> dict[str, float]:
        """The statistics of everything so far; NaN where there is nothing, or nothing but zeros."""
        if not self.squares > 0:
            return dict.fromkeys(COLUMNS, math.nan)
        rms = math.sqrt(self.squares / self.count)
        median = self._quantile(0.5)
        channel_kurtosis = math.nan
        if self.channel_squares is not None and not self.channels_differ:  # all channels have as many values
            channel_kurtosis = float(self.channel_squares.square().mean() / self.channel_squares.mean().square())
        return {
            "kurtosis_channels": channel_kurtosis,
            "kurtosis": self.fourths / self.count / (self.squares / self.count) ** 2,
            "max_over_median": self.largest / median if median > 0 else math.inf,
            "beyond_6_sigma": self._share_above(SIGMAS * rms),
        }

    def _quantile(self, q: float) -> float:
        """A quantile of |s|, interpolated between the edges of its bin."""
        cumulative = self.bins.cumsum(0)
        wanted = q * self.count
        place = int(torch.searchsorted(cumulative, wanted))
        low, high = _edges(place)
        here = int(self.bins[place])
        return low + (high - low) * (wanted - (int(cumulative[place]) - here)) / here if place else 0.0

    def _share_above(self, value: float) -> float:
        if value >= self.largest:
            return 0.0
        place = int(torch.tensor(value, dtype=torch.float32).view(torch.int32)) >> BIN_BITS
        low, high = _edges(place)
        part = int(self.bins[place]) * min(1.0, max(0.0, (high - value) / (high - low)))
        return (int(self.bins[place + 1 :].sum()) + part) / self.count


def _edges(place: int) -> tuple[float, float]:
    """The smallest values of a bin and of the next bin."""
    edges = (torch.tensor([place, place + 1], dtype=torch.int32) << BIN_BITS).view(torch.float32)
    return float(edges[0]), float(edges[1])


class OutlierMeter:
    """Outlier statistics of a model's layers and latents, over all tensors that pass through it inside the ``with``.

    .. code-block:: python

        from soap_opt.integrations.compressai import latents

        with OutlierMeter(net, **latents(net)) as meter, torch.no_grad():
            for x in images:
                net(x)
        print(meter)
        meter.table().to_csv("outliers.csv")

    The columns of :meth:`table`: ``layer``, ``type``, ``calls``, ``values`` (the number of finite values), ``not_finite``,

    - ``kurtosis_channels``: kurtosis of the channels' root mean squares, which run over all images and positions;
    - ``kurtosis``: of all values;
    - ``max_over_median``: the largest ``|s|`` over the median ``|s|``; inf where the median is 0 (after a ReLU);
    - ``beyond_6_sigma``: share of ``|s|`` > 6 sqrt(mean s^2).

    Values of several images, and of several calls of one module, count as one sample, in any order. The sums are float64 and
    so exact. The median, and the share beyond 6 sigma, come from a histogram whose bins are 1/256 to 1/128 of the value wide
    (float64 values are rounded to float32): the median is off by less than 0.8 %, the share by less than the share of ``|s|``
    within 0.8 % of 6 sigma. A statistic is NaN where a layer saw no values, or zeros alone; ``kurtosis_channels`` is NaN where
    the number of channels changed.

    A measured forward pass takes about half as long again on a CPU, and some 20 bytes for each value of one output at a time;
    the meter holds 256 KiB for each layer. The model is not changed, nor put into eval mode. A model that torch.compile
    compiled before does not call the hooks: measure the module that was compiled.

    Args:
        model: any module.
        layers: which outputs to measure: None for :func:`is_layer`'s; names as in ``named_modules()``; or a function of
            (name, module) that returns whether to measure the module.
        outputs, inputs: labels of your own -> names of modules whose output (or first input) is measured as well, as latents.
        channels: a function (module, tensor) -> dim of the channels (default: :func:`channel_dim`).

    Where a module returns or takes several tensors (a tuple, a list, a dict), the first floating-point tensor is measured.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a name that the model does not have, or a label that comes twice; nothing that is to be measured.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Callable[[str, nn.Module], bool] | Iterable[str] | None = None,
        *,
        outputs: Mapping[str, str] | None = None,
        inputs: Mapping[str, str] | None = None,
        channels: Callable[[nn.Module, Tensor], int] = channel_dim,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        modules = dict(model.named_modules())
        if layers is None:
            chosen = [name for name, module in modules.items() if is_layer(module)]
        elif callable(layers):
            chosen = [name for name, module in modules.items() if layers(name, module)]
        else:
            chosen = [layers] if isinstance(layers, str) else list(layers)
        wanted = [(name, name, False) for name in chosen]
        wanted += [(label, name, False) for label, name in (outputs or {}).items()]
        wanted += [(label, name, True) for label, name in (inputs or {}).items()]
        if not wanted:
            raise ValueError(f"layers: nothing in {type(model).__name__} is to be measured")
        for label, name, _ in wanted:
            if name not in modules:
                raise ValueError(f"the model has no module {name!r}")
            if [other for other, _, _ in wanted].count(label) > 1:
                raise ValueError(f"the label {label!r} comes twice")
        self._channels = channels
        self._wanted = {label: (modules[name], is_input) for label, name, is_input in wanted}
        self._moments = {label: Moments() for label in self._wanted}
        self._handles: list[Any] = []

    def __enter__(self) -> OutlierMeter:
        for label, (module, is_input) in self._wanted.items():
            if is_input:
                hook = module.register_forward_pre_hook(
                    lambda module, args, kwargs, label=label: self._add(label, module, (args, kwargs)), with_kwargs=True
                )
            else:
                hook = module.register_forward_hook(lambda module, args, output, label=label: self._add(label, module, output))
            self._handles.append(hook)
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def reset(self) -> None:
        """Forget what has been seen."""
        self._moments = {label: Moments() for label in self._wanted}

    def table(self) -> Table:
        """A row for each layer, in the model's order, then the labels of ``outputs`` and ``inputs``."""
        return Table(
            {
                "layer": label or "(model)",
                "type": f"input of {kind}" if is_input else kind,
                "calls": moments.calls,
                "values": moments.count,
                "not_finite": moments.not_finite,
                **moments.row(),
            }
            for (label, (module, is_input)), moments in zip(self._wanted.items(), self._moments.values())
            for kind in [type(module).__name__]
        )

    def __str__(self) -> str:
        return str(self.table())

    def _add(self, label: str, module: nn.Module, value: Any) -> None:
        x = _first_tensor(value)
        if x is not None:
            self._moments[label].add(x, self._channels(module, x) if x.dim() else 0)


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((x for x in map(_first_tensor, parts) if x is not None), None)
