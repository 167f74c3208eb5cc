"""What all kernels do with the tables of a step: read a row, arrive, add partial sums in a fixed order.

The tables, which soap_opt/cuda/tables.py and plan.py make:
    tiles          [T, 4] int32           for each program: row of problems, kind, two indices of the tile
    problems       [R, WIDTH] int64       for each product, Gram or elementwise pass: its pointers and sizes
    scalars        [P, SCALARS] float32   for each parameter: numbers of this step, written by the first launch
    group_options  [G, OPTIONS] float32   for each param group: its options, written by the host
    partials       [*] float32            partial sums of programs that share a result
    counters       [*] int32              how many of those programs are done; 0 between launches
"""

import triton
import triton.language as tl

from .constants import GROUP, OPTIONS, WIDTH

# No kernel is compiled anew because one of these arguments is 1, or a pointer a multiple of 16: the kernels that run are those
# that bench/compile_kernels.py compiles, and the first step compiles nothing that later steps do not use.
ARGUMENTS = "tiles problems scalars group_options partials counters grad_scale found_inf units due count".split()

# Partial sums that `total` reads at a time
CHUNK = tl.constexpr(512)


@triton.jit
def read_tile(tiles, problems):
    """``row, kind, r, c = tiles[program]``; row is a pointer to the WIDTH int64 of a row of problems."""
    tile = tiles + tl.program_id(0) * 4
    row = problems + tl.load(tile).to(tl.int64) * WIDTH
    return row, tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)


@triton.jit
def option(row, group_options, COLUMN: tl.constexpr):
    """An option of the row's param group, float32."""
    return tl.load(group_options + tl.load(row + GROUP) * OPTIONS + COLUMN)


@triton.jit
def pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a column of a row. An int64 says nothing about alignment; the tile's class does (ALIGNED: 16 bytes)."""
    address = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def size(row, COLUMN: tl.constexpr, ALIGNED: tl.constexpr):
    """The size in a column of a row, as int32 (plans refuse tensors of 2^31 elements); a multiple of 4 in aligned classes.

    tl.multiple_of stands here, on the load itself: on the result of a call it is lost when the call is inlined.
    """
    value = tl.load(row + COLUMN).to(tl.int32)
    if ALIGNED:
        value = tl.multiple_of(value, 4)
    return value


@triton.jit
def arrive(counter, count):
    """Whether this program is the last of ``count`` to arrive. The last program sees all that the others stored before.

    The barrier puts the stores of every thread before the atomic of the one thread; the release of that atomic and the acquire
    of the last program's do the rest. The last program sets the counter back to 0 for the next step. Which program is last
    varies from run to run; its sums do not, because it adds in the order of the slots.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def total(partials, count):
    """``partials[:count].sum()``, always in the same order."""
    lanes = tl.arange(0, CHUNK)
    sums = tl.zeros([CHUNK], tl.float32)
    for first in range(0, count, CHUNK):
        # .cg: not from this multiprocessor's L1, which may hold an old value
        sums += tl.load(partials + first + lanes, mask=first + lanes < count, other=0.0, cache_modifier=".cg")
    return tl.sum(sums, 0)


@triton.jit
def only_if(inside, flag):
    """``inside & (flag != 0)`` for a number. (Triton's interpreter makes floats of a scalar condition that it broadcasts.)"""
    return inside & (tl.zeros(inside.shape, tl.float32) + flag != 0.0)
