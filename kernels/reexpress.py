"""m and v re-expressed in refreshed bases, for all parameters in one launch per stage."""

import triton
import triton.language as tl

from .constants import (
    FACTOR_COUNT,
    FACTORS,
    NUMEL,
    OUTCOMES,
    PERMUTE,
    REFRESHED,
    SCALARS,
    UNITS,
    USABLE,
    X,
    Y,
)
from .project import BLOCK, COPY, KRONECKER, STORE, kronecker_tile, ragged_products
from .table import ARGUMENTS, pointer, read_tile, size


@triton.jit
def is_refreshed(row):
    """Whether the refresh changed any basis of the row's parameter. The outcomes of the parameter's units are neighbours."""
    outcomes = pointer(row, OUTCOMES, tl.int32, False)
    changed = 0
    for unit in range(0, size(row, UNITS, False)):
        changed += (tl.load(outcomes + unit) == REFRESHED).to(tl.int32)
    return changed != 0


@triton.jit
def permuted_block(row, c):
    """``y = x.index_select(mode, order)`` for all modes of one parameter at once, a block of its elements.

    Element n has index n // stride % size in a mode, so that its value comes from n + (order[index] - index) * stride.
    """
    n = c * BLOCK + tl.arange(0, BLOCK)
    inside = n < size(row, NUMEL, False)
    source = n
    for mode in range(0, size(row, FACTOR_COUNT, False)):
        order = tl.load(row + FACTORS + 2 * mode).to(tl.pointer_type(tl.int64))  # [size]
        packed = tl.load(row + FACTORS + 2 * mode + 1)  # size, and from bit 32 on the stride
        length, stride = (packed & 0xFFFFFFFF).to(tl.int32), (packed >> 32).to(tl.int32)
        index = n // stride % length
        source += (tl.load(order + index, mask=inside, other=0).to(tl.int32) - index) * stride
    x = tl.load(pointer(row, X, tl.float32, False) + source, mask=inside, other=0.0)
    tl.store(pointer(row, Y, tl.float32, False) + n, x, mask=inside)


@triton.jit
def copied_block(row, c, ALIGNED: tl.constexpr):
    """A block of ``y = x``."""
    n = c * BLOCK + tl.arange(0, BLOCK)
    inside = n < size(row, NUMEL, ALIGNED)
    x = tl.load(pointer(row, X, tl.float32, ALIGNED) + n, mask=inside, other=0.0)
    tl.store(pointer(row, Y, tl.float32, ALIGNED) + n, x, mask=inside)


@triton.jit(do_not_specialize=ARGUMENTS)
def due_kernel(units, scalars, due, count):
    """``due = usable[parameter] & ((step[parameter] + offset) % frequency == 0)`` for every unit.

    Only CUDA graphs use this kernel: elsewhere the host knows t, and launches nothing for units that are not due.

    Args:
        units: [count, 4] int64: pointer to t, offset, number of the parameter, frequency.
        due: [count] uint8, out.
    """
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < count
    step = tl.load(units + 4 * unit, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    t = tl.load(step, mask=inside, other=0.0).to(tl.int64)
    offset = tl.load(units + 4 * unit + 1, mask=inside, other=0)
    parameter = tl.load(units + 4 * unit + 2, mask=inside, other=0)
    frequency = tl.load(units + 4 * unit + 3, mask=inside, other=1)
    usable = tl.load(scalars + parameter * SCALARS + USABLE, mask=inside, other=0.0) != 0.0
    tl.store(due + unit, (usable & ((t + offset) % frequency == 0)).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=ARGUMENTS)
def reexpress_kernel(tiles, problems, PRECISION: tl.constexpr, DEEP: tl.constexpr):
    """``m = torch.einsum("aib,ij->ajb", m, rotation)`` and ``v = v.index_select(mode, order)``: one stage of both.

    A program returns at once where its parameter kept all of its bases, which only the device knows.
    """
    row, kind, r, c = read_tile(tiles, problems)
    if is_refreshed(row):
        if kind == KRONECKER:
            kronecker_tile(row)
        elif kind == PERMUTE:
            permuted_block(row, c)
        elif kind == COPY:
            if r == 1:
                copied_block(row, c, True)
            else:
                copied_block(row, c, False)
        else:
            ragged_products(row, kind, r, c, None, None, None, tl.float32, STORE, False, PRECISION, DEEP)
