"""SOAP's step as functions of lists of tensors: the choice of an implementation for each parameter, and its call."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import _ext
from .batch import Batch, Skipped
from .cpu import cpu_soap
from .cuda.plan import pieces_of
from .cuda.problems import is_too_large
from .cuda.stepper import CudaStepper
from .gradients import clipping_scale, state_dtype
from .layout import Layout
from .multi_tensor import _multi_tensor_soap
from .options import Options
from .single_tensor import _single_tensor_soap


class Path(Enum):
    """An implementation of the step."""

    SINGLE = "single tensor"  # the specification
    MULTI = "multi tensor"
    CPU = "C++ engine"
    CUDA = "Triton kernels"


def path_of(tensor: Tensor, options: Options, layout: Layout | None = None) -> Path:
    """The implementation that steps a parameter. No other place decides this.

    Args:
        tensor: the parameter, or its exp_avg.
        options: the options of its param group.
        layout: the parameter's layout. Without one, a parameter that is too large for the kernels' int32 offsets counts as any
            other.
    """
    path = path_on(device_type_of(tensor), options)
    # float64 has no tensor cores to gain from, and few models use it: PyTorch's own kernels serve it
    if path is Path.CUDA and (state_dtype(tensor) == torch.float64 or (layout is not None and is_too_large(layout))):
        return Path.MULTI
    return path


def path_on(device_type: str, options: Options) -> Path:
    """:func:`path_of` for parameters of float32 state and any size, on a device of this type."""
    fused = options.fused
    if fused is None and options.foreach is None:
        fused = _ext.is_default(device_type)
    if fused:
        return Path.CPU if device_type == "cpu" else Path.CUDA
    return Path.MULTI if options.foreach is None or options.foreach else Path.SINGLE


def device_type_of(tensor: Tensor) -> str:
    """The device type that :func:`path_of` goes by. (Tests and benchmarks replace this function to treat the CPU as CUDA.)"""
    return tensor.device.type


def require_fused(options: Options, tensor: Tensor) -> None:
    """Raise RuntimeError with the reason where ``fused=True`` cannot be met for a parameter."""
    if options.fused:
        reason = _ext.unavailable(device_type_of(tensor))
        if reason is not None:
            raise RuntimeError(f"fused=True cannot be met: {reason}")


def soap(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grams: list[Tensor],
    bases: list[Tensor],
    refresh_offsets: list[Tensor],
    state_steps: list[Tensor],
    layouts: list[Layout],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    cuda: CudaStepper | None = None,
    **options: Any,
) -> Skipped:
    """One steady step (steps 1 to 6 of :class:`soap_opt.SOAP`) for parameters that are initialised, in torch's flat signature.

    Lists run over parameters; lists of matrices run over the preconditioned modes, parameter after parameter. d_i are the
    sizes of a parameter's preconditioned modes, ``layouts[p].sizes``.

    Args:
        params: updated in place.
        grads: the gradients, of the same shapes; never written.
        exp_avgs, exp_avg_sqs: m and v in the eigenbasis, the parameter's shape, float32 (float64 for float64).
        grams, bases: G_i and Q_i, [d_i, d_i].
        refresh_offsets: one 0-d int64 tensor on the CPU for each mode.
        state_steps: t, 0-d float32 tensors.
        layouts: the layout of each parameter.
        grad_scale: 1-element tensor that the gradients are divided by; None for 1.
        found_inf: [1]; where it is not 0 nothing is stepped, and no gradient counts as unusable. Only the fused CUDA path reads
            it; on other paths the caller has to.
        cuda: owns the tables and buffers that the fused CUDA path keeps between steps; ``cuda.wait()`` waits for refreshes that
            still run on their own stream. Without it a call makes all of them anew, overlaps no refresh, and waits for the
            device.
        options: the arguments of :class:`soap_opt.SOAP`, with its defaults, the same for all parameters. The options that shape
            state (``merge_dims`` and others) are contained in ``layouts`` and have no effect here.

    Returns:
        Indices of the parameters that were not stepped, and of the parameters with a due basis that could not be refreshed.
        (With ``cuda`` the fused CUDA path keeps both counts in it instead.)

    Raises:
        TypeError: SOAP has no such option.
        ValueError: the value of an option is out of its range.
        RuntimeError: ``fused=True`` cannot be met on the device of a parameter.
    """
    record = Options(**options)
    record.check()
    if not params:
        return Skipped([], [])
    for param in {param.device: param for param in params}.values():
        require_fused(record, param)
    state = (exp_avgs, exp_avg_sqs, grams, bases, refresh_offsets, state_steps, layouts)
    if cuda is None:
        record = replace(record, overlap_refresh=False)
    batch = Batch(params, grads, *state, options=[record] * len(params))
    if cuda is not None:
        return step_batch(batch, grad_scale, found_inf, cuda)
    cuda = CudaStepper()
    skipped = step_batch(batch, grad_scale, found_inf, cuda)
    for i, exp_avg in enumerate(exp_avgs):
        for places, count in zip(skipped, cuda.following.counts(exp_avg)):
            places.extend([i] * count)
    return skipped


def step_batch(batch: Batch, grad_scale: Tensor | None, found_inf: Tensor | None, cuda: CudaStepper) -> Skipped:
    """:func:`soap` for parameters that one call may serve (:func:`soap_opt.work.together`)."""
    parts = parts_of(batch)
    on_cuda = path_of(batch.exp_avgs[0], batch.options[0]) is Path.CUDA
    skipped = Skipped([], [])
    if on_cuda and len(parts) > 1 and len(groups := batch.groups()) > 1:  # groups share launches within one part only
        for _, own in groups:
            skipped.extend(step_batch(batch.select(own), grad_scale, found_inf, cuda), own)
        return skipped
    clip = batch.options[0].max_grad_norm
    # The first launch on CUDA computes every norm of its call. Several calls, and other paths, need a pass for the norms.
    if clip is not None and not (len(parts) == 1 and parts[0][0] is Path.CUDA):
        grad_scale = clipping_scale(batch.grads, grad_scale, clip)
        batch = batch.with_options(max_grad_norm=None)
    for path, indices in parts:
        part = batch.select(indices)
        if path is Path.CUDA:
            left = cuda.step(part, grad_scale, found_inf)
        elif on_cuda and found_inf is not None and float(found_inf) != 0:  # (a parameter too large for the kernels: read here)
            continue
        else:
            left = {Path.CPU: cpu_soap, Path.MULTI: _multi_tensor_soap, Path.SINGLE: _single_tensor_soap}[path](
                part, grad_scale
            )
        skipped.extend(left, indices)
    return skipped


def parts_of(batch: Batch) -> list[tuple[Path, list[int]]]:
    """The batch in parts, each stepped by one call of an implementation. A part has one device and one dtype of state; on CUDA
    its scratch is within the limit."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    devices, dtypes = (set(map(attrgetter(name), batch.exp_avgs)) for name in ("device", "dtype"))
    if len(devices) == len(dtypes) == 1:  # nearly always so; it saves a loop over thousands of parameters
        kinds[devices.pop(), dtypes.pop()] = list(range(len(batch)))
    else:
        for i, exp_avg in enumerate(batch.exp_avgs):
            kinds.setdefault((exp_avg.device, exp_avg.dtype), []).append(i)
    paths = [path_of(batch.exp_avgs[indices[0]], batch.options[indices[0]]) for indices in kinds.values()]
    if len(kinds) > 1 and not {Path.CPU, Path.CUDA}.isdisjoint(paths):  # (where there is one call, it checks before it writes)
        for param, exp_avg in zip(batch.params, batch.exp_avgs):
            if state_dtype(param) != exp_avg.dtype:
                raise RuntimeError(f"a parameter is {param.dtype}, its state {exp_avg.dtype}")
    parts: list[tuple[Path, list[int]]] = []
    for path, indices in zip(paths, kinds.values()):
        if path is not Path.CUDA:
            parts.append((path, indices))
            continue
        options, layouts = batch.options[indices[0]], tuple(batch.layouts[i] for i in indices)
        for piece in pieces_of(layouts, options.scratch_limit):  # (a parameter that is too large is a piece of its own)
            own = [indices[i] for i in piece]
            parts.append((path_of(batch.exp_avgs[own[0]], options, layouts[piece[0]]), own))
    return parts
