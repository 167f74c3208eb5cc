"""What every kernel does with the launch plan's tables: read a row, arrive, add partial sums in a fixed order.

Shapes, in the words of soap_opt/cuda/tables.py, which makes all of these:
    tiles     [T, 4] int32    for each program: row of problems, kind, two indices of the tile
    problems  [R, WIDTH] int64  pointers and sizes of one product, Gram or elementwise pass
    scalars   [P, SCALARS] float32  of each parameter in this step, written by the first launch
    group_options   [G, OPTIONS] float32  of each param group, written by the host
    partials  [*] float32     partial sums of programs that work on one result
    counters  [*] int32       how many of those programs are done; 0 between launches
"""

import triton
import triton.language as tl

from ..cuda import columns

X = tl.constexpr(columns.X)
Y = tl.constexpr(columns.Y)
MATRIX = tl.constexpr(columns.MATRIX)
DEPTH = tl.constexpr(columns.DEPTH)
INNER = tl.constexpr(columns.INNER)
COLUMNS = tl.constexpr(columns.COLUMNS)
INDEX = tl.constexpr(columns.INDEX)
EXP_AVG = tl.constexpr(columns.EXP_AVG)
EXP_AVG_SQ = tl.constexpr(columns.EXP_AVG_SQ)
PARAM = tl.constexpr(columns.PARAM)
PARAM_DTYPE = tl.constexpr(columns.PARAM_DTYPE)
SLOT = tl.constexpr(columns.SLOT)
COUNT = tl.constexpr(columns.COUNT)
COUNTER = tl.constexpr(columns.COUNTER)
STEP = tl.constexpr(columns.STEP)
SKIPPED = tl.constexpr(columns.SKIPPED)
OUTCOMES = tl.constexpr(columns.OUTCOMES)
UNITS = tl.constexpr(columns.UNITS)
NUMEL = tl.constexpr(columns.NUMEL)
FACTOR_COUNT = tl.constexpr(columns.FACTOR_COUNT)
GROUP = tl.constexpr(columns.GROUP)
FACTORS = tl.constexpr(columns.FACTORS)
WIDTH = tl.constexpr(columns.WIDTH)

USABLE = tl.constexpr(columns.USABLE)
FACTOR = tl.constexpr(columns.FACTOR)
STEP_SIZE = tl.constexpr(columns.STEP_SIZE)
DECAY = tl.constexpr(columns.DECAY)
RESCALE = tl.constexpr(columns.RESCALE)
NORM_SQUARED = tl.constexpr(columns.NORM_SQUARED)
SCALARS = tl.constexpr(columns.SCALARS)

LR = tl.constexpr(columns.LR)
WEIGHT_DECAY = tl.constexpr(columns.WEIGHT_DECAY)
LOG_BETA1 = tl.constexpr(columns.LOG_BETA1)
LOG_BETA2 = tl.constexpr(columns.LOG_BETA2)
SIGN = tl.constexpr(columns.SIGN)
CORRECT_BIAS = tl.constexpr(columns.CORRECT_BIAS)
MAX_GRAD_NORM = tl.constexpr(columns.MAX_GRAD_NORM)
FIRST_PARAMETER = tl.constexpr(columns.FIRST_PARAMETER)
PARAMETERS = tl.constexpr(columns.PARAMETERS)
REST1 = tl.constexpr(columns.REST1)
BETA2 = tl.constexpr(columns.BETA2)
REST2 = tl.constexpr(columns.REST2)
SHAMPOO_REST = tl.constexpr(columns.SHAMPOO_REST)
EPS = tl.constexpr(columns.EPS)
NORMALIZE = tl.constexpr(columns.NORMALIZE)
OPTIONS = tl.constexpr(columns.OPTIONS)

# No kernel is compiled anew because an argument happens to be 1, or a pointer a multiple of 16: what bench/compile_kernels.py
# compiles is what runs, and the first steps compile nothing that the second does not use.
ARGUMENTS = "tiles problems scalars group_options partials counters grad_scale found_inf units due count".split()

# Terms of a partial sum that one pass of `total` reads
CHUNK = tl.constexpr(512)


@triton.jit
def read_tile(tiles, problems):
    """``row, kind, r, c = tiles[program]``, the row as a pointer to its WIDTH int64."""
    tile = tiles + tl.program_id(0) * 4
    row = problems + tl.load(tile).to(tl.int64) * WIDTH
    return row, tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)


@triton.jit
def option(row, group_options, COLUMN: tl.constexpr):
    """An option of the row's param group, float32."""
    return tl.load(group_options + tl.load(row + GROUP) * OPTIONS + COLUMN)


@triton.jit
def pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a column of a row. An int64 says nothing about alignment: the tile's class does (ALIGNED: 16 bytes)."""
    address = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def size(row, COLUMN: tl.constexpr, ALIGNED: tl.constexpr):
    """A size as int32 (plans refuse tensors of 2^31 elements); a multiple of 4 in aligned classes.

    Said here, of the load itself: on the result of a call tl.multiple_of is lost when the call is inlined.
    """
    value = tl.load(row + COLUMN).to(tl.int32)
    if ALIGNED:
        value = tl.multiple_of(value, 4)
    return value


@triton.jit
def arrive(counter, count):
    """Whether this program is the last of ``count`` to come here; it then sees what all the others stored before.

    The barrier puts every thread's stores before the one thread's atomic; its release and the last program's acquire do the
    rest. The last one sets the counter back to 0 for the next step. Who is last varies from run to run, what it computes
    does not: it adds in the order of the slots.
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
        # .cg: not from this multiprocessor's L1, which may hold what stood there before
        sums += tl.load(partials + first + lanes, mask=first + lanes < count, other=0.0, cache_modifier=".cg")
    return tl.sum(sums, 0)


@triton.jit
def only_if(inside, flag):
    """``inside & (flag != 0)`` for a number. (Triton's interpreter makes floats of a scalar condition that it broadcasts.)"""
    return inside & (tl.zeros(inside.shape, tl.float32) + flag != 0.0)
