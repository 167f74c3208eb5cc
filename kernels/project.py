"""Mode products of all parameters in one launch: into the eigenbasis and back, with the elementwise stages as epilogues."""

import triton
import triton.language as tl

from ..cuda import columns
from .adam import adam_numbers, adam_update, apply_numbers, apply_update, finish_norm, finish_rms
from .constants import (
    APPLY,
    BLOCK,
    COLUMNS,
    COPY,
    DEPTH,
    FACTOR_COUNT,
    FACTORS,
    INNER,
    KRONECKER,
    KRONECKER_WIDTH,
    MATRIX,
    NORM,
    NORMALIZE,
    NUMEL,
    X,
    Y,
)
from .dot import dot
from .table import ARGUMENTS, option, pointer, read_tile, size

(WIDE_0, LONG_0), (WIDE_1, LONG_1), (WIDE_2, LONG_2) = (map(tl.constexpr, tile) for tile in columns.TILES)

# STAGE: what the epilogue does with a tile of the product
STORE = tl.constexpr(0)  # stores it in scratch, for the next product
FIRST = tl.constexpr(1)  # stores it too; x is the gradient, and its squares are summed on the way
ADAM = tl.constexpr(2)  # adam_update
UPDATE = tl.constexpr(3)  # apply_update


@triton.jit
def product_tile(
    row, r, c, x_dtype: tl.constexpr,
    WIDE: tl.constexpr, LONG: tl.constexpr, DEEP: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
    BACK: tl.constexpr, SQUARES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of ``torch.einsum("aib,ij->ajb", x, Q)``, or of ``"aib,ji->ajb"`` with BACK.

    x [A, D, B] is not moved in memory. Its A * B columns are numbered n = a B + b, and tiles may cut them anywhere, so that a
    5 x 5 kernel's B = 25 fills tiles as well as B = 3,200. With B = 1 the columns are rows of memory, and the tile is
    transposed (ROWS), so that neighbouring threads touch neighbouring addresses in both cases.

    Pays for the mix of shapes of a whole model, where one cuBLAS call for each tensor is bound by launches. Does not pay for
    a single large matrix: cuBLAS has larger tiles and wgmma pipelines that are tuned for it.

    Args:
        r: the tile makes the results j from r * WIDE on.
        c: the tile takes the columns from c * LONG on.
        DEEP: values of i in one iteration.

    Returns:
        The tile ([LONG, WIDE] with ROWS, else [WIDE, LONG]) in float32; the offset of each of its elements; whether the element
        exists; and the sums of squares of the x that were read (zeros without SQUARES).
    """
    depth, inner, columns = (
        size(row, DEPTH, ALIGNED),
        size(row, INNER, ALIGNED and not ROWS),
        size(row, COLUMNS, ALIGNED and not ROWS),
    )
    x = pointer(row, X, x_dtype, ALIGNED)
    matrix = pointer(row, MATRIX, tl.float32, ALIGNED)  # [D, D]
    j = r * WIDE + tl.arange(0, WIDE)
    n = c * LONG + tl.arange(0, LONG)
    if ROWS:
        column = n * depth
    else:
        column = (n // inner) * (depth * inner) + n % inner
        if ALIGNED:  # four neighbours lie in one row, because B is a multiple of 4
            column = tl.max_contiguous(tl.multiple_of(column, 4), 4)

    if ROWS:
        product = tl.zeros([LONG, WIDE], tl.float32)
        squares = tl.zeros([LONG, DEEP], tl.float32)
    else:
        product = tl.zeros([WIDE, LONG], tl.float32)
        squares = tl.zeros([DEEP, LONG], tl.float32)
    for first in range(0, depth, DEEP):
        i = first + tl.arange(0, DEEP)
        if ROWS:
            part = tl.load(x + column[:, None] + i[None, :], mask=(n < columns)[:, None] & (i < depth)[None, :], other=0.0)
            part = part.to(tl.float32)
            there = (i < depth)[:, None] & (j < depth)[None, :]
            if BACK:
                q = tl.load(matrix + j[None, :] * depth + i[:, None], mask=there, other=0.0)
            else:
                q = tl.load(matrix + i[:, None] * depth + j[None, :], mask=there, other=0.0)
            product = dot(part, q, product, PRECISION, x_dtype != tl.float32, False)
        else:
            part = tl.load(
                x + i[:, None] * inner + column[None, :], mask=(i < depth)[:, None] & (n < columns)[None, :], other=0.0
            )
            part = part.to(tl.float32)
            there = (j < depth)[:, None] & (i < depth)[None, :]
            if BACK:
                q = tl.load(matrix + j[:, None] * depth + i[None, :], mask=there, other=0.0)
            else:
                q = tl.load(matrix + i[None, :] * depth + j[:, None], mask=there, other=0.0)
            product = dot(q, part, product, PRECISION, False, x_dtype != tl.float32)
        if SQUARES:
            squares += part * part

    if ROWS:
        offset = column[:, None] + j[None, :]
        inside = (n < columns)[:, None] & (j < depth)[None, :]
    else:
        offset = j[:, None] * inner + column[None, :]
        inside = (j < depth)[:, None] & (n < columns)[None, :]
    return product, offset, inside, squares


@triton.jit
def finished_tile(
    row, r, c, sums, first, group_options,
    GRAD: tl.constexpr, STAGE: tl.constexpr, BACK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr, LONG: tl.constexpr, DEEP: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """:func:`product_tile` and its epilogue. sums: (scalars, partials, counters); first: see finish_norm."""
    if STAGE == ADAM:
        numbers = adam_numbers(row, sums[0], group_options)
        normalize = option(row, group_options, NORMALIZE)
    if STAGE == UPDATE:
        numbers = apply_numbers(row, sums[0])
    product, offset, inside, squares = product_tile(
        row, r, c, GRAD, WIDE, LONG, DEEP, ROWS, ALIGNED, BACK, STAGE == FIRST, PRECISION
    )
    if STAGE == STORE or STAGE == FIRST:
        tl.store(pointer(row, Y, tl.float32, ALIGNED) + offset, product, mask=inside)
    if STAGE == FIRST:
        if r == 0:  # all r read the same x: one of them counts its squares
            finish_norm(row, c, squares, sums, first)
    if STAGE == ADAM:
        update = adam_update(product, offset, inside, row, numbers, ALIGNED)
        tl.store(pointer(row, Y, tl.float32, ALIGNED) + offset, update, mask=inside)
        if normalize != 0:
            across = (size(row, DEPTH, False) + WIDE - 1) // WIDE
            finish_rms(row, c * across + r, update, inside, sums)
    if STAGE == UPDATE:
        apply_update(product, offset, inside, row, numbers, ALIGNED)


@triton.jit
def ragged_products(
    row, kind, r, c, sums, first, group_options,
    GRAD: tl.constexpr, STAGE: tl.constexpr, BACK: tl.constexpr,
    PRECISION: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """:func:`finished_tile` in the tile's class: a size of columns.TILES (64, 32, 16), ROWS, and ALIGNED for the largest size.

    A class is a branch, not a kernel of its own, because a launch costs more than the branch.
    """
    NARROW: tl.constexpr = 16 if DEEP > 16 else DEEP  # a group of width 16 at most has no more values of i
    if kind == 0:
        finished_tile(row, r, c, sums, first, group_options, GRAD, STAGE, BACK, PRECISION,
                      WIDE_0, LONG_0, DEEP, False, False)  # fmt: skip
    elif kind == 1:
        finished_tile(row, r, c, sums, first, group_options, GRAD, STAGE, BACK, PRECISION,
                      WIDE_0, LONG_0, DEEP, False, True)  # fmt: skip
    elif kind == 2:
        finished_tile(row, r, c, sums, first, group_options, GRAD, STAGE, BACK, PRECISION,
                      WIDE_0, LONG_0, DEEP, True, False)  # fmt: skip
    elif kind == 3:
        finished_tile(row, r, c, sums, first, group_options, GRAD, STAGE, BACK, PRECISION,
                      WIDE_0, LONG_0, DEEP, True, True)  # fmt: skip
    elif kind == 4:
        finished_tile(row, r, c, sums, first, group_options, GRAD, STAGE, BACK, PRECISION,
                      WIDE_1, LONG_1, DEEP, False, False)  # fmt: skip
    elif kind == 6:
        finished_tile(row, r, c, sums, first, group_options, GRAD, STAGE, BACK, PRECISION,
                      WIDE_1, LONG_1, DEEP, True, False)  # fmt: skip
    elif kind == 8:
        finished_tile(row, r, c, sums, first, group_options, GRAD, STAGE, BACK, PRECISION,
                      WIDE_2, LONG_2, NARROW, False, False)  # fmt: skip
    elif kind == 10:
        finished_tile(row, r, c, sums, first, group_options, GRAD, STAGE, BACK, PRECISION,
                      WIDE_2, LONG_2, NARROW, True, False)  # fmt: skip


@triton.jit
def kronecker_tile(row):
    """``torch.kron(Q_1, torch.kron(Q_2, ...))`` -> [D, D], D <= 64, for the products of later launches.

    Every step makes the product anew, so that it is up to date whoever changed a basis; 50 products of 25 x 25 are 125 KB.
    """
    depth, factors = size(row, DEPTH, False), size(row, FACTOR_COUNT, False)
    i = tl.arange(0, KRONECKER_WIDTH)[:, None]
    j = tl.arange(0, KRONECKER_WIDTH)[None, :]
    inside = (i < depth) & (j < depth)
    product = tl.full([KRONECKER_WIDTH, KRONECKER_WIDTH], 1.0, tl.float32)
    stride = depth  # after the division by its size: the stride of the factor's index in i and j
    for factor in range(0, factors):
        width = tl.load(row + FACTORS + 2 * factor + 1).to(tl.int32)
        basis = tl.load(row + FACTORS + 2 * factor).to(tl.pointer_type(tl.float32))  # [width, width]
        stride = stride // width
        place = (i // stride) % width * width + (j // stride) % width
        product *= tl.load(basis + place, mask=inside, other=0.0)
    tl.store(pointer(row, Y, tl.float32, False) + i * depth + j, product, mask=inside)


@triton.jit(do_not_specialize=ARGUMENTS)
def project_first_kernel(
    tiles, problems, scalars, partials, counters, grad_scale, found_inf, group_options,
    GRAD: tl.constexpr, PRECISION: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """``torch.einsum("aib,ij->ajb", grad, Q)`` for every parameter's first mode, and ``grad.norm()`` of every parameter.

    There is one launch for each dtype of gradients. Parameters whose products begin in a later launch get only their norm here,
    in blocks; one more read of G is cheaper than a launch. COPY also writes the gradient to scratch as float32.
    """
    row, kind, r, c = read_tile(tiles, problems)
    sums = (scalars, partials, counters)
    first = (grad_scale, found_inf, group_options)
    if kind == KRONECKER:
        kronecker_tile(row)
    elif kind >= NORM:
        if r == 1:
            norm_block(row, kind, c, sums, first, GRAD, True)
        else:
            norm_block(row, kind, c, sums, first, GRAD, False)
    else:
        ragged_products(row, kind, r, c, sums, first, None, GRAD, FIRST, False, PRECISION, DEEP)


@triton.jit
def norm_block(row, kind, c, sums, first, GRAD: tl.constexpr, ALIGNED: tl.constexpr):
    """A block of a gradient: its part of the norm, and with COPY its copy in scratch as float32."""
    offset = c * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size(row, NUMEL, ALIGNED)
    grad = tl.load(pointer(row, X, GRAD, ALIGNED) + offset, mask=inside, other=0.0).to(tl.float32)
    if kind == COPY:
        tl.store(pointer(row, Y, tl.float32, ALIGNED) + offset, grad, mask=inside)
    finish_norm(row, c, grad * grad, sums, first)


@triton.jit(do_not_specialize=ARGUMENTS)
def project_kernel(tiles, problems, BACK: tl.constexpr, PRECISION: tl.constexpr, DEEP: tl.constexpr):
    """``torch.einsum("aib,ij->ajb", x, Q)``, with BACK ``"aib,ji->ajb"``: a product from scratch to scratch."""
    row, kind, r, c = read_tile(tiles, problems)
    ragged_products(row, kind, r, c, None, None, None, tl.float32, STORE, BACK, PRECISION, DEEP)


@triton.jit(do_not_specialize=ARGUMENTS)
def project_adam_kernel(
    tiles, problems, scalars, partials, counters, group_options, PRECISION: tl.constexpr, DEEP: tl.constexpr
):  # fmt: skip
    """``adam_update(torch.einsum("aib,ij->ajb", x, Q))``: every parameter's last projection, which never goes to memory."""
    row, kind, r, c = read_tile(tiles, problems)
    sums = (scalars, partials, counters)
    ragged_products(row, kind, r, c, sums, None, group_options, tl.float32, ADAM, False, PRECISION, DEEP)


@triton.jit(do_not_specialize=ARGUMENTS)
def project_apply_kernel(tiles, problems, scalars, PRECISION: tl.constexpr, DEEP: tl.constexpr):
    """``p.sub_(lr * c * torch.einsum("aib,ji->ajb", u, Q)).mul_(1 - lr * weight_decay)``: the last back-projection.

    APPLY tiles do the same without a product, for parameters without modes whose update had to wait for its rms.
    """
    row, kind, r, c = read_tile(tiles, problems)
    if kind == APPLY:
        if r == 1:
            apply_block(row, c, scalars, True)
        else:
            apply_block(row, c, scalars, False)
    else:
        sums = (scalars, None, None)
        ragged_products(row, kind, r, c, sums, None, None, tl.float32, UPDATE, True, PRECISION, DEEP)


@triton.jit
def apply_block(row, c, scalars, ALIGNED: tl.constexpr):
    """Apply a block of an update that waited in scratch."""
    offset = c * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size(row, NUMEL, ALIGNED)
    update = tl.load(pointer(row, X, tl.float32, ALIGNED) + offset, mask=inside, other=0.0)
    apply_update(update, offset, inside, row, apply_numbers(row, scalars), ALIGNED)
