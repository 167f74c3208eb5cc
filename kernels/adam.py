"""Adam in the eigenbasis, and the application of its update: epilogues of the mode products, and tiles of their own for
parameters that nothing multiplies."""

import triton
import triton.language as tl

from .table import (
    CHUNK,
    COUNT,
    COUNTER,
    DECAY,
    EXP_AVG,
    EXP_AVG_SQ,
    FACTOR,
    INDEX,
    NORM_SQUARED,
    NUMEL,
    PARAM,
    PARAM_DTYPE,
    RESCALE,
    SCALARS,
    SKIPPED,
    SLOT,
    STEP,
    STEP_SIZE,
    USABLE,
    arrive,
    only_if,
    pointer,
    size,
    total,
)


@triton.jit
def finish_norm(row, c, squares, sums, first):
    """``usable = (grad / grad_scale).norm().square().isfinite();  step += usable`` and what later launches need of both.

    Every program of the first launch that has seen elements of G for the first time calls it with their squares; the last
    one to arrive adds up and writes the parameter's row of scalars. It is the only writer, and it comes before any launch
    that writes state.

    Args:
        squares: [*, *] squares of this tile's raw gradients, float32.
        sums: (scalars, partials, counters).
        first: (grad_scale, lr_scale, lr, weight_decay, log_beta1, log_beta2, sign, correct_bias, max_grad_norm, parameters).
        grad_scale: [1] float32 that the gradients are divided by; NaN stands for found_inf (the step is not to count).
        lr_scale: [1] float32; a learning rate that is a tensor is multiplied in here, with lr = 1.
        log_beta1, log_beta2: natural logarithms; 1 - beta^t of a small t would lose its digits in float32, and float64 of one
            program for each parameter costs nothing.
        sign: -1 to maximize.
        max_grad_norm: limit of the norm of all ``parameters`` together; 0 for none.
    """
    scalars, partials, counters = sums
    grad_scale, lr_scale, lr, weight_decay, log_beta1, log_beta2, sign, correct_bias, max_grad_norm, parameters = first
    lr = lr * tl.load(lr_scale)
    slot = partials + tl.load(row + SLOT)
    count = size(row, COUNT, False)
    tl.store(slot + c, tl.sum(squares))
    if arrive(counters + tl.load(row + COUNTER), count):
        scale = tl.load(grad_scale)
        inverse = 1.0 / scale
        norm_squared = total(slot, count) * inverse * inverse
        usable = norm_squared < float("inf")  # false for NaN too
        out = scalars + tl.load(row + INDEX) * SCALARS
        step = pointer(row, STEP, tl.float32, False)
        t = tl.load(step)
        if usable:
            t += 1.0
            tl.store(step, t)
        elif scale == scale:
            skipped = pointer(row, SKIPPED, tl.int32, False)
            tl.store(skipped, tl.load(skipped) + 1)
        correction = 1.0
        if correct_bias != 0:
            wide = t.to(tl.float64)
            correction1 = 1.0 - tl.exp(wide * log_beta1)
            correction2 = 1.0 - tl.exp(wide * log_beta2)
            correction = (tl.sqrt(correction2) / correction1).to(tl.float32)
        tl.store(out + USABLE, usable.to(tl.float32))
        tl.store(out + FACTOR, sign * inverse)
        tl.store(out + STEP_SIZE, lr * correction)
        tl.store(out + DECAY, 1.0 - lr * weight_decay)
        tl.store(out + RESCALE, 1.0)
        if max_grad_norm > 0:
            tl.store(out + NORM_SQUARED, tl.where(usable, norm_squared, 0.0))
            if arrive(counters, parameters):
                clip(scalars, max_grad_norm, parameters)


@triton.jit
def clip(scalars, max_grad_norm, parameters):
    """``factors *= (max_grad_norm / (total_norm + 1e-6)).clamp(max=1)``: clip_grad_norm_ without touching a gradient.

    Run by the one program that finds all norms there; Grams and Adam multiply by the factor anyway.
    """
    lanes = tl.arange(0, CHUNK)
    squares = tl.zeros([CHUNK], tl.float32)
    for first in range(0, parameters, CHUNK):
        place = (first + lanes) * SCALARS + NORM_SQUARED
        squares += tl.load(scalars + place, mask=first + lanes < parameters, other=0.0, cache_modifier=".cg")
    coefficient = tl.minimum(max_grad_norm / (tl.sqrt(tl.sum(squares, 0)) + 1e-6), 1.0)
    for first in range(0, parameters, CHUNK):
        place, there = (first + lanes) * SCALARS + FACTOR, first + lanes < parameters
        factors = tl.load(scalars + place, mask=there, other=0.0, cache_modifier=".cg")
        tl.store(scalars + place, factors * coefficient, mask=there)


@triton.jit
def adam_update(projected, offset, inside, row, scalars, adam, ALIGNED: tl.constexpr):
    """``m.lerp_(g, 1 - beta1);  v.mul_(beta2).addcmul_(g, g, value=1 - beta2);  m / (v.sqrt() + eps)``, g the projected G.

    Pays because g is in registers: m and v are read and written once, g not at all. Nothing is written of a parameter whose
    gradient is not usable (the result is then meaningless and never applied).

    Args:
        projected: [*, *] tile of the raw gradient in the eigenbasis; the scale and the sign are multiplied in here.
        adam: (beta1, beta2, eps, normalize).
        offset, inside: [*, *] element of the parameter's memory, and whether there is one.
    """
    beta1, beta2, eps, _ = adam
    out = scalars + tl.load(row + INDEX) * SCALARS
    writable = only_if(inside, tl.load(out + USABLE))
    g = projected * tl.load(out + FACTOR)
    m_pointer = pointer(row, EXP_AVG, tl.float32, ALIGNED) + offset
    v_pointer = pointer(row, EXP_AVG_SQ, tl.float32, ALIGNED) + offset
    m = tl.load(m_pointer, mask=inside, other=0.0)
    v = tl.load(v_pointer, mask=inside, other=0.0)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    tl.store(m_pointer, m, mask=writable)
    tl.store(v_pointer, v, mask=writable)
    return m / (tl.sqrt(v) + eps)


@triton.jit
def finish_rms(row, slot_index, update, inside, sums):
    """``1 / (1e-30 + update.square().mean().sqrt())``, the factor of normalize_grads; a parameter's last program writes it.

    Taken from U' in the eigenbasis: orthogonal bases keep the norm. The back-projection cannot run before every program of
    this launch is done, so the factor is there when it is needed.
    """
    scalars, partials, counters = sums
    slot = partials + tl.load(row + SLOT)
    count = size(row, COUNT, False)
    tl.store(slot + slot_index, tl.sum(tl.where(inside, update * update, 0.0)))
    if arrive(counters + tl.load(row + COUNTER), count):
        mean = total(slot, count) / tl.load(row + NUMEL).to(tl.float32)
        out = scalars + tl.load(row + INDEX) * SCALARS
        tl.store(out + RESCALE, 1.0 / (1e-30 + tl.sqrt(mean)))


@triton.jit
def apply_update(update, offset, inside, row, scalars, ALIGNED: tl.constexpr):
    """``p.sub_(u, alpha=lr * c).mul_(1 - lr * weight_decay)`` in float32, rounded once to p's dtype.

    One branch for each dtype (0 float32, 1 bfloat16, 2 float16), so that parameters of different dtypes share the launch.
    """
    out = scalars + tl.load(row + INDEX) * SCALARS
    inside = only_if(inside, tl.load(out + USABLE))
    change = update * (tl.load(out + STEP_SIZE) * tl.load(out + RESCALE))
    decay = tl.load(out + DECAY)
    dtype = tl.load(row + PARAM_DTYPE)
    if dtype == 0:
        p = pointer(row, PARAM, tl.float32, ALIGNED) + offset
        tl.store(p, (tl.load(p, mask=inside, other=0.0) - change) * decay, mask=inside)
    elif dtype == 1:
        p_bfloat16 = pointer(row, PARAM, tl.bfloat16, ALIGNED) + offset
        moved = (tl.load(p_bfloat16, mask=inside, other=0.0).to(tl.float32) - change) * decay
        tl.store(p_bfloat16, moved.to(tl.bfloat16), mask=inside)
    else:
        p_float16 = pointer(row, PARAM, tl.float16, ALIGNED) + offset
        moved = (tl.load(p_float16, mask=inside, other=0.0).to(tl.float32) - change) * decay
        tl.store(p_float16, moved.to(tl.float16), mask=inside)
