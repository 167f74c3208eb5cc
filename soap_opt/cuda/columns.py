"""The format of the tables that the kernels read: columns, kinds of tiles, sizes of tiles. The kernels import this module.

It needs neither Triton nor a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..layout import KRONECKER_MAX_FACTOR, KRONECKER_MAX_WIDTH

if TYPE_CHECKING:
    from ..options import Options

# Columns of a row of problems
X = 0  # pointer to the input: a gradient, or scratch
Y = 1  # pointer to the output in scratch
MATRIX = 2  # pointer to Q, or to a Kronecker product of bases, [D, D]
DEPTH = 3  # D, the width of the group of modes
INNER = 4  # B, the elements inside of the group: memory is [A, D, B]
COLUMNS = 5  # A * B
INDEX = 6  # number of the parameter: its row of scalars
EXP_AVG, EXP_AVG_SQ, PARAM = 7, 8, 9  # pointers
PARAM_DTYPE = 10  # place in DTYPES
SLOT = 11  # place of the first partial sum
COUNT = 12  # number of programs that share one result
COUNTER = 13  # place of the first counter of arrivals
STEP, SKIPPED = 14, 15  # pointers to t (float32) and to the number of unusable gradients (int32)
NUMEL = 16  # number of elements of the parameter
GROUP = 17  # number of the param group: its row of options
OUTCOMES, UNITS = 18, 19  # re-expressing: pointer to the outcome of the parameter's first unit (int32); number of its units
FACTOR_COUNT = 20  # number of factors
FACTORS = 21  # pointer and size of each factor: bases of a Kronecker product, Grams, orders (size + (stride << 32))
MAX_FACTORS = int(math.log2(KRONECKER_MAX_WIDTH))
WIDTH = FACTORS + 2 * MAX_FACTORS

# Columns of a row of scalars, which the first launch writes for each parameter
USABLE = 0  # 1 when the gradient and its squared norm are finite, else 0
FACTOR = 1  # multiplies the raw gradient: sign / grad_scale
STEP_SIZE = 2  # lr * c
DECAY = 3  # 1 - lr * weight_decay
RESCALE = 4  # 1 / (1e-30 + rms(U)), or 1
NORM_SQUARED = 5  # ||G||_F^2, or 0 for an unusable gradient; only with max_grad_norm
SCALARS = 8

# Columns of a row of options, which each param group has
LR = 0
FIRST_PARAMETER, PARAMETERS = 1, 2  # the group's first parameter, and their number; they are neighbours
# The following columns, and their values. True and False are 1 and 0; logarithms are natural.
OPTION_VALUES: dict[str, Callable[[Options], float]] = {
    "WEIGHT_DECAY": lambda o: o.weight_decay,
    "LOG_BETA1": lambda o: logarithm(o.beta1),
    "LOG_BETA2": lambda o: logarithm(o.beta2),
    "REST1": lambda o: 1 - o.beta1,  # (in float64: the difference of float32 numbers would be wrong by 1e-5)
    "BETA2": lambda o: o.beta2,
    "REST2": lambda o: 1 - o.beta2,
    "SHAMPOO_REST": lambda o: 1 - o.gram_beta,
    "EPS": lambda o: o.eps,
    "CORRECT_BIAS": lambda o: o.correct_bias,
    "NORMALIZE": lambda o: o.normalize_grads,
    "SIGN": lambda o: -1 if o.maximize else 1,
    "MAX_GRAD_NORM": lambda o: o.max_grad_norm or 0,  # 0 for none
}
OPTION_COLUMNS = {name: PARAMETERS + 1 + place for place, name in enumerate(OPTION_VALUES)}
OPTIONS = -(-(PARAMETERS + 1 + len(OPTION_VALUES)) // 8) * 8  # columns of a row of options in all
vars().update(OPTION_COLUMNS)  # as columns.EPS, like all other columns


def logarithm(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


DTYPES = ("float32", "bfloat16", "float16")

# Kinds of tiles. The kinds 0 .. 11 are the classes of products and Grams: 4 * (place in TILES) + 2 * ROWS + ALIGNED.
NORM, COPY, KRONECKER, ADAM_GRAD, ADAM_SCRATCH, APPLY, PERMUTE = 12, 13, 14, 15, 16, 17, 18

# Outcomes of soap_opt::refresh_basis_: the basis was kept, was refreshed, could not be refreshed
KEPT, REFRESHED, FAILED = 0, 1, 2

BLOCK = 2048  # elements of an elementwise tile
KRONECKER_WIDTH, KRONECKER_FACTOR = KRONECKER_MAX_WIDTH, KRONECKER_MAX_FACTOR
PACK = 1 << 12  # a Gram tile's r is tile_i * PACK + tile_j
MAX_NUMEL = (1 << 31) - (1 << 16)  # offsets inside a tensor or a matrix are int32


class Tile(NamedTuple):
    """Sizes of a tile, in the words of kernels/project.py and kernels/gram_ema.py."""

    wide: int  # results of a product's tile along the group's dimension D; rows and columns of a Gram's
    long: int  # columns of a product's tile


# A group of width D takes the smallest tile that holds it, so that 3 x 3 and 5 x 5 kernels (9 and 25 wide) are padded to 16
# and 32. Wider groups are cut into 64: 128-wide tiles would read x half as often, but pad 192 to 256.
TILES = (Tile(64, 64), Tile(32, 128), Tile(16, 128))
