"""Gram matrices of all modes of all parameters and their moving averages in one launch, some elementwise Adam beside them."""

import triton
import triton.language as tl

from ..cuda import columns
from .adam import adam_numbers, adam_update, apply_numbers, apply_update, finish_rms, without_subnormals
from .constants import (
    ADAM_GRAD,
    ADAM_SCRATCH,
    BLOCK,
    COLUMNS,
    COUNT,
    COUNTER,
    DEPTH,
    FACTOR,
    FACTOR_COUNT,
    FACTORS,
    INDEX,
    INNER,
    KRONECKER_FACTOR,
    NORMALIZE,
    NUMEL,
    PACK,
    SCALARS,
    SHAMPOO_REST,
    SLOT,
    USABLE,
    X,
    Y,
)
from .dot import dot
from .table import ARGUMENTS, arrive, only_if, option, pointer, read_tile, size

(WIDE_0, _), (WIDE_1, _), (WIDE_2, _) = (map(tl.constexpr, tile) for tile in columns.TILES)


@triton.jit
def ema(gram, place, mirrored, outer, inside, row, scalars, rest):
    """``gram.lerp_(outer, rest)`` for elements of the lower triangle, and their mirror images."""
    out = scalars + tl.load(row + INDEX) * SCALARS
    factor = tl.load(out + FACTOR)
    inside = only_if(inside, tl.load(out + USABLE))
    old = tl.load(gram + place, mask=inside, other=0.0)
    new = without_subnormals(old + rest * (outer * (factor * factor) - old))
    tl.store(gram + place, new, mask=inside)
    tl.store(gram + mirrored, new, mask=inside)


@triton.jit
def partial_traces(row, slot, scalars, rest, SIZE: tl.constexpr):
    """``gram_f.lerp_(outer.diagonal(other factors).sum(-1), rest)`` for each factor f of a Kronecker group.

    ``slot`` holds outer [SIZE, SIZE], of which the upper left [D, D] counts. Only the lower triangle is read, so that the
    Grams are symmetric to the bit.
    """
    depth, factors = size(row, DEPTH, False), size(row, FACTOR_COUNT, False)
    u = tl.arange(0, KRONECKER_FACTOR)[:, None]
    w = tl.arange(0, KRONECKER_FACTOR)[None, :]
    other = tl.arange(0, SIZE // 2)[:, None, None]  # a factor has at least two rows
    after = depth
    for factor in range(0, factors):
        width = tl.load(row + FACTORS + 2 * factor + 1).to(tl.int32)
        gram = tl.load(row + FACTORS + 2 * factor).to(tl.pointer_type(tl.float32))  # [width, width]
        after = after // width
        inside = (u < width) & (w <= u)
        # the indices of the other factors, before and after f, all at once
        fixed = other // after * (after * width) + other % after
        place = (fixed + (u * after)[None, :, :]) * SIZE + fixed + (w * after)[None, :, :]
        there = (other < depth // width) & inside[None, :, :]
        trace = tl.sum(tl.load(slot + place, mask=there, other=0.0, cache_modifier=".cg"), 0)
        ema(gram, u * width + w, w * width + u, trace, inside, row, scalars, rest)


@triton.jit
def gram_tile(
    row, r, c, sums, rest,
    GRAD: tl.constexpr, PRECISION: tl.constexpr,
    SIZE: tl.constexpr, DEEP: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of ``gram.lerp_(torch.einsum("aib,ajb->ij", x, x), rest)`` in the lower triangle, and its mirror image.

    Pays because half of the products and the pass of lerp_ over the Gram are saved, and because a long contraction (a 25 x 25
    Gram over 16,384 columns) is cut into several programs (gram_splits of cuda/problems.py). The last of these programs to
    arrive adds their partial sums in order. The products are full float32.

    Args:
        r: the tile's place in the triangle, tile_i * PACK + tile_j.
        c: the number of the part of the columns, 0 .. splits - 1.
    """
    scalars, partials, counters = sums
    depth, inner, columns = (
        size(row, DEPTH, ALIGNED),
        size(row, INNER, ALIGNED and not ROWS),
        size(row, COLUMNS, ALIGNED and not ROWS),
    )
    # bfloat16 and float16 fit into TF32: one product is then as exact as the three that float32 takes
    FITS: tl.constexpr = GRAD != tl.float32
    splits = size(row, COUNT, False)
    x = pointer(row, X, GRAD, ALIGNED)  # [A, D, B], columns numbered as in product_tile
    tile_i, tile_j = r // PACK, r % PACK
    number = tile_i * (tile_i + 1) // 2 + tile_j
    i = tile_i * SIZE + tl.arange(0, SIZE)
    j = tile_j * SIZE + tl.arange(0, SIZE)

    iterations = (columns + DEEP - 1) // DEEP
    share = (iterations + splits - 1) // splits
    outer = tl.zeros([SIZE, SIZE], tl.float32)
    for iteration in range(c * share, min((c + 1) * share, iterations)):
        n = iteration * DEEP + tl.arange(0, DEEP)
        if ROWS:
            column, left_row, right_row = n * depth, i, j
        else:
            column, left_row, right_row = (n // inner) * (depth * inner) + n % inner, i * inner, j * inner
            if ALIGNED:
                column = tl.max_contiguous(tl.multiple_of(column, 4), 4)
        # Both operands are loaded in the shape that dot takes: with tl.trans, Triton 3.6 loads 4 bytes at a time
        left = tl.load(x + left_row[:, None] + column[None, :], mask=(i < depth)[:, None] & (n < columns)[None, :], other=0.0)
        right = tl.load(x + column[:, None] + right_row[None, :], mask=(n < columns)[:, None] & (j < depth)[None, :], other=0.0)
        outer = dot(left.to(tl.float32), right.to(tl.float32), outer, PRECISION, FITS, FITS)

    factors = size(row, FACTOR_COUNT, False)
    done = True
    slot = partials + tl.load(row + SLOT) + number.to(tl.int64) * splits * (SIZE * SIZE)  # 2^31 for (8192, 65536), and more
    inside_slot = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    if splits > 1 or factors > 1:
        tl.store(slot + c * (SIZE * SIZE) + inside_slot, outer)
        done = arrive(counters + tl.load(row + COUNTER) + number, splits)
        if done and splits > 1:
            AT_ONCE: tl.constexpr = 2 if SIZE > 32 else 4  # more would take registers that the products need
            outer = tl.zeros([SIZE, SIZE], tl.float32)
            for first in range(0, splits, AT_ONCE):
                for ahead in tl.static_range(AT_ONCE):  # loads that do not wait for each other
                    place = (first + ahead) * (SIZE * SIZE) + inside_slot
                    there = place < splits * (SIZE * SIZE)
                    outer += tl.load(slot + place, mask=there, other=0.0, cache_modifier=".cg")
            if factors > 1:
                tl.store(slot + inside_slot, outer)
                tl.debug_barrier()
    if done:
        if factors > 1:
            partial_traces(row, slot, scalars, rest, SIZE)
        else:
            inside = (i < depth)[:, None] & (j[None, :] <= i[:, None])
            place, mirrored = i[:, None] * depth + j[None, :], j[None, :] * depth + i[:, None]
            ema(pointer(row, FACTORS, tl.float32, ALIGNED), place, mirrored, outer, inside, row, scalars, rest)


@triton.jit(do_not_specialize=ARGUMENTS)
def gram_ema_kernel(
    tiles, problems, scalars, partials, counters, group_options,
    GRAD: tl.constexpr, PRECISION: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """``gram.lerp_(torch.einsum("aib,ajb->ij", grad, grad), 1 - shampoo_beta)`` for every mode; one launch for each dtype.

    Adam runs here, in blocks, for parameters that have no product in a later launch: parameters without modes (from the
    gradient), and, where no parameter has two products, parameters whose only product is done already (from scratch).
    """
    row, kind, r, c = read_tile(tiles, problems)
    sums = (scalars, partials, counters)
    rest = option(row, group_options, SHAMPOO_REST)
    if kind == ADAM_GRAD:
        adam_block(row, r, c, sums, group_options, GRAD, True)
    elif kind == ADAM_SCRATCH:
        adam_block(row, r, c, sums, group_options, tl.float32, False)
    elif kind == 0:
        gram_tile(row, r, c, sums, rest, GRAD, PRECISION, WIDE_0, DEEP, False, False)
    elif kind == 1:
        gram_tile(row, r, c, sums, rest, GRAD, PRECISION, WIDE_0, DEEP, False, True)
    elif kind == 2:
        gram_tile(row, r, c, sums, rest, GRAD, PRECISION, WIDE_0, DEEP, True, False)
    elif kind == 3:
        gram_tile(row, r, c, sums, rest, GRAD, PRECISION, WIDE_0, DEEP, True, True)
    elif kind == 4:
        gram_tile(row, r, c, sums, rest, GRAD, PRECISION, WIDE_1, 2 * DEEP, False, False)
    elif kind == 6:
        gram_tile(row, r, c, sums, rest, GRAD, PRECISION, WIDE_1, 2 * DEEP, True, False)
    elif kind == 8:
        gram_tile(row, r, c, sums, rest, GRAD, PRECISION, WIDE_2, 4 * DEEP, False, False)
    elif kind == 10:
        gram_tile(row, r, c, sums, rest, GRAD, PRECISION, WIDE_2, 4 * DEEP, True, False)


@triton.jit
def adam_block(
    row, r, c, sums, group_options,
    X_DTYPE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """:func:`adam_elements`; r = 1 says that its elements may be read in vectors."""
    if r == 1:
        adam_elements(row, c, sums, group_options, X_DTYPE, WHOLE, True)
    else:
        adam_elements(row, c, sums, group_options, X_DTYPE, WHOLE, False)


@triton.jit
def adam_elements(
    row, c, sums, group_options,
    X_DTYPE: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of ``adam_update(x)``. With WHOLE the block is applied as well, unless the update has to wait for its rms."""
    offset = c * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size(row, NUMEL, ALIGNED)
    x = tl.load(pointer(row, X, X_DTYPE, ALIGNED) + offset, mask=inside, other=0.0).to(tl.float32)
    update = adam_update(x, offset, inside, row, adam_numbers(row, sums[0], group_options), ALIGNED)
    if option(row, group_options, NORMALIZE) != 0:
        tl.store(pointer(row, Y, tl.float32, ALIGNED) + offset, update, mask=inside)
        finish_rms(row, c, update, inside, sums)
    elif WHOLE:
        apply_update(update, offset, inside, row, apply_numbers(row, sums[0]), ALIGNED)
    else:
        tl.store(pointer(row, Y, tl.float32, ALIGNED) + offset, update, mask=inside)
