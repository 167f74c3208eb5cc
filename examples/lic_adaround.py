"""AdaRound (Nagel et al. 2020, arXiv 2004.10568): weights rounded up or down, whichever reconstructs the layer's output."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lic_grids import TINY, channel_weights, groups, integer_limits, on_grid
from torch import Tensor, nn

POSITIONS = 1 << 14  # output positions of a layer that AdaRound reconstructs
# Nagel et al. 2020, arXiv 2004.10568, section 3: the rectified sigmoid's stretch, and the exponent's annealing.
GAMMA, ZETA = -0.1, 1.1
BETA_FIRST, BETA_LAST = 20.0, 2.0
WARM_UP = 0.2  # of the iterations without the regulariser
REGULARISER = 0.3  # against a reconstruction error of 1 = that of rounding to nearest
ITERATIONS = 600
STEP_SIZE = 0.02  # of Adam; from the middle, 0.5, to either end h takes V some 120 such steps


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
