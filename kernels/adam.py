"""Adam in the eigenbasis, and the application of its update: as epilogues of the mode products, and in tiles of their own for
parameters without products."""

import triton
import triton.language as tl

from .constants import (
    BETA2,
    CORRECT_BIAS,
    COUNT,
    COUNTER,
    DECAY,
    EPS,
    EXP_AVG,
    EXP_AVG_SQ,
    FACTOR,
    FIRST_PARAMETER,
    GROUP,
    INDEX,
    LOG_BETA1,
    LOG_BETA2,
    LR,
    MAX_GRAD_NORM,
    NORM_SQUARED,
    NUMEL,
    OPTIONS,
    PARAM,
    PARAM_DTYPE,
    PARAMETERS,
    RESCALE,
    REST1,
    REST2,
    SCALARS,
    SIGN,
    SKIPPED,
    SLOT,
    STEP,
    STEP_SIZE,
    USABLE,
    WEIGHT_DECAY,
)
from .table import CHUNK, arrive, only_if, option, pointer, size, total

SMALLEST_NORMAL = tl.constexpr(2.0**-126)
LARGEST_SQUARED_NORM = tl.constexpr((2.0 - 2.0**-23) * 2.0**125)  # a quarter of the largest number: gradients.is_usable


@triton.jit
def without_subnormals(x):
    """``x.masked_fill_(x.abs() < finfo.tiny, 0)``. Subnormals do not slow down a GPU, but a CPU may continue the run."""
    return tl.where(tl.abs(x) < SMALLEST_NORMAL, 0.0, x)


@triton.jit
def finish_norm(row, c, squares, sums, first):
    """``usable = (grad / grad_scale).norm().square() <= finfo.max / 4;  step += usable``; and the scalars of later launches.

    Every program of the first launch calls this with the squares of the elements of G that no other program counts. The last
    program to arrive adds up the squares and writes the parameter's row of scalars. No other program writes this row, and
    every launch that writes state comes later.

    Args:
        squares: [*, *] squares of this tile's raw gradients, float32.
        sums: (scalars, partials, counters).
        first: (grad_scale, found_inf, group_options).
        grad_scale: [1] float32 that the gradients are divided by.
        found_inf: [1] float32; where it is not 0 nothing is stepped, and no gradient counts as unusable.
        group_options: [G, OPTIONS] options of the param groups. (For a small t, 1 - beta^t would lose its digits in float32;
            float64 in one program for each parameter costs nothing.)
    """
    scalars, partials, counters = sums
    grad_scale, found_inf, group_options = first
    slot = partials + tl.load(row + SLOT)
    count = size(row, COUNT, False)
    tl.store(slot + c, tl.sum(squares))
    if arrive(counters + tl.load(row + COUNTER), count):
        group = group_options + tl.load(row + GROUP) * OPTIONS
        inverse = 1.0 / tl.load(grad_scale)
        found = tl.load(found_inf) != 0.0
        norm_squared = total(slot, count) * inverse * inverse
        usable = (norm_squared <= LARGEST_SQUARED_NORM) & (found == 0)  # false for NaN too
        out = scalars + tl.load(row + INDEX) * SCALARS
        step = pointer(row, STEP, tl.float32, False)
        t = tl.load(step)
        if usable:
            t += 1.0
            tl.store(step, t)
        elif found == 0:
            skipped = pointer(row, SKIPPED, tl.int32, False)
            tl.store(skipped, tl.load(skipped) + 1)
        correction = 1.0
        if tl.load(group + CORRECT_BIAS) != 0:
            wide = t.to(tl.float64)
            correction1 = 1.0 - tl.exp(wide * tl.load(group + LOG_BETA1))
            correction2 = 1.0 - tl.exp(wide * tl.load(group + LOG_BETA2))
            correction = (tl.sqrt(correction2) / correction1).to(tl.float32)
        tl.store(out + USABLE, usable.to(tl.float32))
        lr = tl.load(group + LR)
        tl.store(out + FACTOR, tl.load(group + SIGN) * inverse)
        tl.store(out + STEP_SIZE, lr * correction)
        tl.store(out + DECAY, 1.0 - lr * tl.load(group + WEIGHT_DECAY))
        tl.store(out + RESCALE, 1.0)
        if tl.load(group + MAX_GRAD_NORM) > 0:
            tl.store(out + NORM_SQUARED, tl.where(usable, norm_squared, 0.0))
            parameters, before = tl.load(group + PARAMETERS).to(tl.int32), tl.load(group + FIRST_PARAMETER).to(tl.int32)
            if arrive(counters + tl.load(row + GROUP), parameters):
                clip(scalars + before * SCALARS, parameters, tl.load(group + MAX_GRAD_NORM))


@triton.jit
def clip(scalars, parameters, max_grad_norm):
    """``factors *= (max_grad_norm / (total_norm + 1e-6)).clamp(max=1)``: clip_grad_norm_ without touching a gradient.

    Only the program that finds all norms of a param group complete runs this. Grams and Adam multiply by the factor anyway.

    Args:
        scalars: the rows of the group, from its first parameter on.
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
def adam_numbers(row, scalars, group_options):
    """The numbers of :func:`adam_update`, fetched before the product: they take three loads that wait for each other."""
    out = scalars + tl.load(row + INDEX) * SCALARS
    return (
        tl.load(out + USABLE),
        tl.load(out + FACTOR),
        option(row, group_options, REST1),
        option(row, group_options, BETA2),
        option(row, group_options, REST2),
        option(row, group_options, EPS),
    )


@triton.jit
def adam_update(projected, offset, inside, row, numbers, ALIGNED: tl.constexpr):
    """``m.lerp_(g, 1 - beta1);  v.mul_(beta2).addcmul_(g, g, value=1 - beta2);  m / (v.sqrt() + eps)``, g the projected G. The
    result is 0 where the denominator is 0.

    Pays because g is in registers: m and v are read and written once, g not at all. Where the gradient is not usable, m and v
    are not written, and the result is meaningless and never applied.

    Args:
        projected: [*, *] tile of the raw gradient in the eigenbasis; the function multiplies by its scale and sign.
        numbers: the result of :func:`adam_numbers`.
        offset, inside: [*, *] offset of each element in the parameter's memory, and whether the element exists.
    """
    usable, factor, rest1, beta2, rest2, eps = numbers
    writable = only_if(inside, usable)
    g = projected * factor
    m_pointer = pointer(row, EXP_AVG, tl.float32, ALIGNED) + offset
    v_pointer = pointer(row, EXP_AVG_SQ, tl.float32, ALIGNED) + offset
    m = tl.load(m_pointer, mask=inside, other=0.0)
    v = tl.load(v_pointer, mask=inside, other=0.0)
    m = without_subnormals(m + rest1 * (g - m))
    v = without_subnormals(beta2 * v + rest2 * g * g)
    tl.store(m_pointer, m, mask=writable)
    tl.store(v_pointer, v, mask=writable)
    denominator = tl.sqrt(v) + eps
    return tl.where(denominator > 0.0, m / denominator, 0.0)


@triton.jit
def finish_rms(row, slot_index, update, inside, sums):
    """``1 / (1e-30 + update.square().mean().sqrt())``, the factor of normalize_grads, from a parameter's last program.

    The rms is taken from U' in the eigenbasis: orthogonal bases keep the norm. The factor is there in time, because the
    back-projection begins after every program of this launch is done.
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
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")  # false for NaN


@triton.jit
def apply_numbers(row, scalars):
    """The numbers of :func:`apply_update`, fetched before the product, and the parameter's dtype."""
    out = scalars + tl.load(row + INDEX) * SCALARS
    scale = tl.load(out + STEP_SIZE) * tl.load(out + RESCALE)
    return tl.load(out + USABLE), scale, tl.load(out + DECAY), tl.load(row + PARAM_DTYPE)


@triton.jit
def apply_update(update, offset, inside, row, numbers, ALIGNED: tl.constexpr):
    """``p.sub_(u, alpha=lr * c).mul_(1 - lr * weight_decay)`` in float32, rounded once to p's dtype. An entry stays as it
    is where p's dtype cannot hold the new one.

    Each dtype has a branch (0 float32, 1 bfloat16, 2 float16), so that parameters of different dtypes share the launch.
    """
    usable, scale, decay, dtype = numbers
    inside = only_if(inside, usable)
    change = update * scale
    if dtype == 0:
        p = pointer(row, PARAM, tl.float32, ALIGNED) + offset
        moved = (tl.load(p, mask=inside, other=0.0) - change) * decay
        tl.store(p, moved, mask=inside & is_finite(moved))
    elif dtype == 1:
        p_bfloat16 = pointer(row, PARAM, tl.bfloat16, ALIGNED) + offset
        moved_bfloat16 = ((tl.load(p_bfloat16, mask=inside, other=0.0).to(tl.float32) - change) * decay).to(tl.bfloat16)
        tl.store(p_bfloat16, moved_bfloat16, mask=inside & is_finite(moved_bfloat16))
    else:
        p_float16 = pointer(row, PARAM, tl.float16, ALIGNED) + offset
        moved_float16 = ((tl.load(p_float16, mask=inside, other=0.0).to(tl.float32) - change) * decay).to(tl.float16)
        tl.store(p_float16, moved_float16, mask=inside & is_finite(moved_float16))
