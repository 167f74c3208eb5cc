"""The tables that one launch for all parameters reads: ragged problems, tiles, pointers, scratch.

A *problem* is one product, one Gram or one elementwise pass of one parameter: a row of int64 (pointers, sizes). A *tile* is
what one program of a launch does: (row of problems, kind, r, c) as int32. kernels/README.md works three parameters through.

Everything here is derived from layouts, dtypes and pointers, and disposable. Needs neither Triton nor a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .kernel_configs import CONFIGS, architecture_of, config_of
from .layout import KRONECKER_MAX_FACTOR, KRONECKER_MAX_WIDTH, Layout

# Columns of a row of problems
X = 0  # pointer to what is read: a gradient, or scratch
Y = 1  # pointer to what is written in scratch
MATRIX = 2  # pointer to Q or a Kronecker product of them, [D, D]
DEPTH = 3  # D, the width of the group of modes
INNER = 4  # B, the number of elements behind the group: memory is [A, D, B]
COLUMNS = 5  # A * B
INDEX = 6  # number of the parameter: its row of scalars
EXP_AVG, EXP_AVG_SQ, PARAM = 7, 8, 9  # pointers
PARAM_DTYPE = 10  # place in DTYPES
SLOT = 11  # first partial sum
COUNT = 12  # how many programs share a result (Kronecker products: how many factors)
COUNTER = 13  # the first counter of arrivals
STEP, SKIPPED = 14, 15  # pointers: t (float32), how many gradients were not usable (int32)
OUTCOMES, UNITS = 14, 15  # re-expressing: pointer to what became of the parameter's first unit (int32), how many it has
NUMEL = 16  # elements of the parameter (Grams: how many factors)
GROUP = 17  # number of the param group: its row of options
FACTORS = 18  # pointer and size of each factor: bases of a Kronecker product, Grams, orders (size + (stride << 32))
MAX_FACTORS = int(math.log2(KRONECKER_MAX_WIDTH))
WIDTH = FACTORS + 2 * MAX_FACTORS

# Columns of a row of scalars, which the first launch writes for each parameter
USABLE = 0  # 1 when the gradient is finite and so is its squared norm
FACTOR = 1  # multiplies the raw gradient: sign / grad_scale
STEP_SIZE = 2  # lr * c
DECAY = 3  # 1 - lr * weight_decay
RESCALE = 4  # 1 / (1e-30 + rms(U)), or 1
NORM_SQUARED = 5  # ||G||_F^2, 0 when it is not usable; only with max_grad_norm
SCALARS = 8

# Columns of a row of options: what differs between param groups. 0 or 1 for what is on or off.
LR = 0
WEIGHT_DECAY = 1
LOG_BETA1, LOG_BETA2 = 2, 3  # natural logarithms
SIGN = 4  # -1 to maximize
CORRECT_BIAS = 5
MAX_GRAD_NORM = 6  # 0 for none
FIRST_PARAMETER, PARAMETERS = 7, 8  # the group's, which are neighbours
REST1, BETA2, REST2, SHAMPOO_REST = 9, 10, 11, 12  # 1 - beta: the difference of float32 numbers would be wrong by 1e-5
EPS = 13
NORMALIZE = 14
OPTIONS = 16

DTYPES = ("float32", "bfloat16", "float16")

# Kinds of tiles. 0 .. 11 are the classes of products and Grams: 4 * (place in TILES) + 2 * ROWS + ALIGNED.
NORM, COPY, KRONECKER, ADAM_GRAD, ADAM_SCRATCH, APPLY, PERMUTE = 12, 13, 14, 15, 16, 17, 18

# Outcomes of soap_opt::refresh_basis_: the basis is what it was, it is another
KEPT, REFRESHED, FAILED = 0, 1, 2

BLOCK = 2048  # elements of an elementwise tile
KRONECKER_WIDTH, KRONECKER_FACTOR = KRONECKER_MAX_WIDTH, KRONECKER_MAX_FACTOR
PACK = 1 << 12  # a Gram tile's r is tile_i * PACK + tile_j
MAX_NUMEL = (1 << 31) - (1 << 16)  # offsets inside a tensor or a matrix are int32


class Tile(NamedTuple):
    """Sizes of a tile, in the words of kernels/project.py and kernels/gram_ema.py."""

    wide: int  # of the group's dimension D, up to which the class serves
    long: int  # columns of a product's tile


# A group of width D takes the smallest tile that holds it, so that 3 x 3 and 5 x 5 kernels (9 and 25 wide) are padded to 16
# and 32. Wider groups are cut into 64: 128-wide tiles would read x half as often, but pad 192 to 256.
TILES = (Tile(64, 64), Tile(32, 128), Tile(16, 128))
# What the tables count in; the same for every architecture, so that a table is made without asking for a device.
GRAM_DEEP = CONFIGS["sm_90"]["gram_ema"].deep

# A Gram is cut along its columns where a launch would otherwise have too few programs, or one that outlasts all the others:
# into pieces of at least so many iterations, and no more pieces than four times what an H100 runs at a time (132
# multiprocessors, two programs each). The number is the same on every GPU.
GRAM_MIN_ITERATIONS = 32
GRAM_PROGRAMS = 4 * 2 * 132

# (kernel, device, its constants) -> (what Triton compiled, the constants in the signature's order). Triton's own launch
# compares every global constant of the kernel each time: 60 us, and a step of 10 launches would be longer on the host than on
# the GPU.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int], *arguments: Any, **constants: Any) -> None:
    """Every launch of the fused step goes through here.

    Args:
        arguments: tensors, the first of them on the device, and int32; their dtypes are the same in every launch of a kernel.
        constants: the kernel's constexprs but DEEP, which its :class:`Config` says.
    """
    name = kernel.__name__
    key = (name, arguments[0].device, *constants.values())
    known = _compiled.get(key)
    if known is not None:
        compiled, values = known
        compiled[(*grid, 1, 1)](*arguments, *values)
        return
    config = config_of(_architecture(kernel), name)
    if config.deep:
        constants["DEEP"] = config.deep
    compiled = kernel[grid](*arguments, **constants, num_warps=config.warps, num_stages=config.stages)
    if compiled is not None:  # (Triton's interpreter compiles nothing)
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names if name in constants)


def _architecture(kernel: Any) -> str:
    """What Triton compiles the kernel for; under its interpreter, which compiles nothing, any."""
    if not hasattr(kernel, "device_caches"):
        return "sm_90"
    from triton.runtime.driver import driver  # late: importing soap_opt does not wait for Triton

    target = driver.active.get_current_target()
    return architecture_of(target.backend, target.arch)


class Problem(NamedTuple):
    """One [A, D, B] view of a parameter that a matrix multiplies."""

    group: int  # place in layout.groups
    before: int  # A
    depth: int  # D
    inner: int  # B
    factors: tuple[int, ...]  # places in layout.modes, several for a Kronecker product

    @property
    def columns(self) -> int:
        return self.before * self.inner


def problems_of(layout: Layout) -> list[Problem]:
    """A parameter's products in the order of their launches: Kronecker products last, since the first launch makes them."""
    problems, before = [], 1
    for place, group in enumerate(layout.groups):
        before *= group.width
        if group.modes:
            factors = tuple(layout.modes.index(mode) for mode in group.modes)
            problems.append(Problem(place, before // group.width, group.width, layout.numel // before, factors))
    return sorted(problems, key=lambda problem: len(problem.factors) > 1)


def kind_of(problem: Problem, aligned: bool) -> int:
    """The tile's class, from the shape and whether every pointer is a multiple of 16 bytes."""
    place = next(i for i in reversed(range(len(TILES))) if problem.depth <= TILES[i].wide or i == 0)
    rows = problem.inner == 1
    # Vectors of four along memory: of a row (B = 1) four i, else four columns, which must not straddle two rows. D too, for Q.
    aligned = aligned and place == 0 and problem.depth % 4 == 0 and (rows or problem.inner % 4 == 0)
    return 4 * place + 2 * rows + aligned


def gram_deep(place: int) -> int:
    """Columns of one iteration of a Gram whose tile is TILES[place]: the narrower the tile, the more."""
    return GRAM_DEEP << place


def gram_tiles(problem: Problem, kind: int) -> tuple[list[int], int]:
    """The tiles of a Gram's lower triangle, tile_i * PACK + tile_j, and the iterations over its columns."""
    across = math.ceil(problem.depth / TILES[kind // 4].wide)
    triangle = [i * PACK + j for i in range(across) for j in range(i + 1)]
    return triangle, math.ceil(problem.columns / gram_deep(kind // 4))


def gram_splits(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Into how many programs each tile of the Grams of one launch is cut along its columns. sizes: each Gram's tiles and
    iterations.

    All tiles have about the same share of the launch's iterations: with GRAM_PROGRAMS programs in all, nothing is cut that is
    not longer than its share, so that partial sums (a tile each, written and read once) stay below 70 MB for any model.
    """
    share = max(GRAM_MIN_ITERATIONS, math.ceil(sum(tiles * iterations for tiles, iterations in sizes) / GRAM_PROGRAMS))
    return [max(1, math.ceil(iterations / share)) for _, iterations in sizes]


@dataclass
class Launch:
    """One launch: tiles [first, first + count) of the plan's tile table."""

    kernel: str  # "project_first", "gram_ema", "project", "project_adam", "back", "project_apply" or "reexpress"
    grad_dtype: str  # of DTYPES; "float32" in launches that read scratch
    first: int
    count: int


@dataclass
class Tables:
    """The plan of one step on one device.

    Attributes:
        launches: in their order.
        tiles: [T, 4] int32.
        problems: [R, WIDTH] int64, pointers filled in by :meth:`fill`.
        scratch_numel: elements of each of the two scratch buffers (float32).
        partials_numel, counters: elements of partial sums (float32), arrival counters (int32).
        kronecker_numel: elements of all Kronecker products (float32).
    """

    launches: list[Launch]
    tiles: np.ndarray
    problems: np.ndarray
    scratch_numel: int
    partials_numel: int
    counters: int
    kronecker_numel: int
    _places: np.ndarray = field(repr=False, default=None)  # [n] flat places in problems that hold pointers
    _sources: np.ndarray = field(repr=False, default=None)  # [n] which of fill's pointers
    _offsets: np.ndarray = field(repr=False, default=None)  # [n] bytes behind it

    @property
    def nbytes(self) -> int:
        """Bytes that the plan keeps on the device, without the scratch buffers, which everything on a stream shares."""
        tables = self.tiles.nbytes + self.problems.nbytes
        return tables + 4 * (self.partials_numel + self.counters + self.kronecker_numel)

    def fill(self, pointers: np.ndarray) -> np.ndarray:
        """problems with these pointers, [P * len(PER_PARAMETER) + 2 * modes + len(SHARED)] int64, in the order below."""
        self.problems.reshape(-1)[self._places] = pointers[self._sources] + self._offsets
        return self.problems


# The order of the pointers that Tables.fill takes: for each parameter these, then every basis, every Gram, the shared ones.
PER_PARAMETER = ("grad", "param", "exp_avg", "exp_avg_sq", "step", "skipped")
SHARED = ("scratch_0", "scratch_1", "kronecker")


class _Builder:
    """Collects rows, pointers and tiles while the launches are laid out one after the other."""

    def __init__(self, layouts: Sequence[Layout], groups: Sequence[int]) -> None:
        self.groups = groups  # of each parameter
        self.rows: list[list[int]] = []
        self.places: list[tuple[int, int, int]] = []  # (flat place, source, offset)
        self.tiles: list[np.ndarray] = []
        self.launches: list[Launch] = []
        self.pending: list[np.ndarray] = []
        # the first counters, one for each group: parameters whose norm is known
        self.partials, self.counters = 0, 1 + max(groups, default=0)
        parameters = len(layouts)
        self.first_mode = np.concatenate([[0], np.cumsum([len(layout.modes) for layout in layouts])]).tolist()
        modes = self.first_mode[-1]
        self.basis = len(PER_PARAMETER) * parameters
        self.gram = self.basis + modes
        self.shared = self.gram + modes

    def row(self, **columns: int) -> int:
        values = [0] * WIDTH
        for name, value in columns.items():
            values[globals()[name]] = value
        if "INDEX" in columns:
            values[GROUP] = self.groups[columns["INDEX"]]
        self.rows.append(values)
        return len(self.rows) - 1

    def point(self, row: int, column: int, source: int, offset: int = 0) -> None:
        self.places.append((row * WIDTH + column, source, offset))

    def of_parameter(self, row: int, column: int, index: int, name: str) -> None:
        self.point(row, column, index * len(PER_PARAMETER) + PER_PARAMETER.index(name))

    def of_shared(self, row: int, column: int, name: str, offset: int) -> None:
        self.point(row, column, self.shared + SHARED.index(name), offset)

    def state(self, row: int, index: int) -> None:
        for column, name in ((EXP_AVG, "exp_avg"), (EXP_AVG_SQ, "exp_avg_sq"), (PARAM, "param")):
            self.of_parameter(row, column, index, name)

    def sums(self, row: int, partials: int, count: int, counters: int) -> None:
        values = self.rows[row]
        values[SLOT], values[COUNT], values[COUNTER] = self.partials, count, self.counters
        self.partials += partials
        self.counters += counters

    def grid(self, row: int, kind: int, across: Sequence[int] | int, down: int) -> None:
        """Tiles (r, c) for r in across and c < down; r fastest, so that tiles that read the same columns run together."""
        r = np.asarray(range(across) if isinstance(across, int) else across, dtype=np.int32)
        tiles = np.empty((down * len(r), 4), dtype=np.int32)
        tiles[:, 0], tiles[:, 1] = row, kind
        tiles[:, 2] = np.tile(r, down)
        tiles[:, 3] = np.repeat(np.arange(down, dtype=np.int32), len(r))
        self.pending.append(tiles)

    def blocks(self, row: int, kind: int, count: int, vectors: bool) -> None:
        """Tiles of an elementwise pass. vectors: its elements may be read four at a time, which r says."""
        self.grid(row, kind, [int(vectors)], count)

    def launch(self, kernel: str, grad_dtype: str = "float32") -> None:
        if self.pending:
            tiles = np.concatenate(self.pending)
            self.launches.append(Launch(kernel, grad_dtype, sum(map(len, self.tiles)), len(tiles)))
            self.tiles.append(tiles)
            self.pending = []

    def tables(self, scratch_numel: int, kronecker_numel: int) -> Tables:
        places = np.asarray(self.places, dtype=np.int64).reshape(-1, 3)
        return Tables(
            launches=self.launches,
            tiles=np.concatenate(self.tiles) if self.tiles else np.empty((0, 4), np.int32),
            problems=np.asarray(self.rows, dtype=np.int64).reshape(-1, WIDTH),
            scratch_numel=scratch_numel,
            partials_numel=self.partials,
            counters=self.counters,
            kronecker_numel=kronecker_numel,
            _places=places[:, 0],
            _sources=places[:, 1],
            _offsets=places[:, 2],
        )


def make_tables(
    layouts: Sequence[Layout],
    grad_dtypes: Sequence[str],
    param_dtypes: Sequence[str],
    aligned: Sequence[bool],
    normalize_grads: Sequence[bool],
    groups: Sequence[int],
) -> Tables:
    """Lay out the launches of one step: project 1, Gram, project 2 .. k (Adam), back 1 .. k (apply).

    A parameter with fewer products than others starts its projections, and its back-projections, later, so that Adam is the
    epilogue of one launch for all and the application that of the last; the first launch then only takes its norm.

    Args:
        layouts: of each parameter.
        grad_dtypes, param_dtypes: of DTYPES.
        aligned: whether all pointers of a parameter are multiples of 16 bytes.
        normalize_grads: of each parameter; its update waits for its rms.
        groups: of each parameter, the number of its param group, from 0 on; a group's parameters are neighbours.
    """
    build = _Builder(layouts, groups)
    products = [problems_of(layout) for layout in layouts]
    numels = [layout.numel for layout in layouts]
    starts = np.concatenate([[0], np.cumsum([padded(numel) for numel in numels])]).tolist()
    everyone = range(len(layouts))

    # Number of projection launches. The first one makes the Kronecker products, so that it cannot use them yet.
    orders = [len(p) + (1 if p and len(p[0].factors) > 1 else 0) for p in products]
    stages = max(orders, default=0)
    backs = max((len(p) for p in products), default=0)
    first_stage = [stages - len(p) for p in products]  # 0-based launch of the first projection
    in_scratch = [0] * len(layouts)  # which buffer holds a parameter's latest result

    def scratch(row: int, column: int, index: int, buffer: int) -> None:
        build.of_shared(row, column, f"scratch_{buffer}", 4 * starts[index])

    def product(index: int, problem: Problem, read: Callable[[int], None], written: int | None, kronecker_at: dict) -> int:
        """The row of one mode product; returns it. ``written``: the scratch buffer, None for an epilogue that writes p."""
        row = build.row(
            DEPTH=problem.depth, INNER=problem.inner, COLUMNS=problem.columns, INDEX=index, NUMEL=numels[index],
            PARAM_DTYPE=DTYPES.index(param_dtypes[index]),
        )  # fmt: skip
        read(row)
        if written is not None:
            scratch(row, Y, index, written)
            in_scratch[index] = written
        if len(problem.factors) > 1:
            build.of_shared(row, MATRIX, "kronecker", kronecker_at[index, problem.group])
        else:
            build.point(row, MATRIX, build.basis + build.first_mode[index] + problem.factors[0])
        return row

    def product_grid(index: int, problem: Problem, row: int) -> tuple[int, int]:
        kind = kind_of(problem, aligned[index])
        tile = TILES[kind // 4]
        across, down = math.ceil(problem.depth / tile.wide), math.ceil(problem.columns / tile.long)
        build.grid(row, kind, across, down)
        return across, down

    def vectors(index: int) -> bool:
        return aligned[index] and numels[index] % 4 == 0

    def from_grad(index: int) -> Callable[[int], None]:
        return lambda row: build.of_parameter(row, X, index, "grad")

    def from_scratch(index: int) -> Callable[[int], None]:
        return lambda row: scratch(row, X, index, in_scratch[index])

    # -- project 1, norms, Kronecker products
    kronecker_at: dict[tuple[int, int], int] = {}
    kronecker_numel = 0
    copied = set()
    for dtype in DTYPES:
        for index in everyone:
            if grad_dtypes[index] != dtype:
                continue
            for problem in products[index]:
                if len(problem.factors) > 1:
                    kronecker_at[index, problem.group] = 4 * kronecker_numel
                    row = build.row(DEPTH=problem.depth, COUNT=len(problem.factors))
                    build.of_shared(row, Y, "kronecker", 4 * kronecker_numel)
                    kronecker_numel += padded(problem.depth**2)
                    for place, factor in enumerate(problem.factors):
                        build.point(row, FACTORS + 2 * place, build.basis + build.first_mode[index] + factor)
                        build.rows[row][FACTORS + 2 * place + 1] = layouts[index].sizes[factor]
                    build.grid(row, KRONECKER, 1, 1)
            if products[index] and first_stage[index] == 0:
                problem = products[index][0]
                row = product(index, problem, from_grad(index), 0, kronecker_at)
                count = product_grid(index, problem, row)[1]
            else:
                row = build.row(NUMEL=numels[index], INDEX=index)
                build.of_parameter(row, X, index, "grad")
                count = math.ceil(numels[index] / BLOCK)
                if products[index] and dtype != "float32":  # what later launches read is float32
                    copied.add(index)
                    scratch(row, Y, index, 0)
                build.blocks(row, COPY if index in copied else NORM, count, vectors(index))
            build.sums(row, count, count, 1)
            build.of_parameter(row, STEP, index, "step")
            build.of_parameter(row, SKIPPED, index, "skipped")
        build.launch("project_first", dtype)

    # -- Grams; Adam of parameters without products, and of all where no parameter has two
    waiting = []
    for dtype in DTYPES:
        of_dtype = [index for index in everyone if grad_dtypes[index] == dtype]
        problems = [problem for index in of_dtype for problem in products[index]]
        kinds = [kind_of(problem, aligned[index]) for index in of_dtype for problem in products[index]]
        grams = [gram_tiles(problem, kind) for problem, kind in zip(problems, kinds)]
        cut = gram_splits([(len(triangle), iterations) for triangle, iterations in grams])
        each_gram = zip(kinds, grams, cut)
        for index in of_dtype:
            if not products[index] or stages == 1:
                row = build.row(NUMEL=numels[index], INDEX=index, PARAM_DTYPE=DTYPES.index(param_dtypes[index]))
                count = math.ceil(numels[index] / BLOCK)
                if products[index]:
                    scratch(row, X, index, 0)
                    scratch(row, Y, index, 1)
                    in_scratch[index] = 1
                else:
                    build.of_parameter(row, X, index, "grad")
                    scratch(row, Y, index, 0)
                    waiting += [index] if normalize_grads[index] else []
                build.state(row, index)
                build.sums(row, count, count, 1)
                build.blocks(row, ADAM_SCRATCH if products[index] else ADAM_GRAD, count, vectors(index))
            for problem, (kind, (triangle, _), splits) in zip(products[index], each_gram):
                row = build.row(
                    DEPTH=problem.depth, INNER=problem.inner, COLUMNS=problem.columns, INDEX=index, NUMEL=len(problem.factors)
                )
                build.of_parameter(row, X, index, "grad")
                for place, factor in enumerate(problem.factors):
                    build.point(row, FACTORS + 2 * place, build.gram + build.first_mode[index] + factor)
                    build.rows[row][FACTORS + 2 * place + 1] = layouts[index].sizes[factor]
                stored = splits > 1 or len(problem.factors) > 1
                partials = stored * len(triangle) * splits * TILES[kind // 4].wide ** 2
                build.sums(row, partials, splits, stored * len(triangle))
                build.grid(row, kind, triangle, splits)
        build.launch("gram_ema", dtype)

    # -- project 2 .. k, the last with Adam
    for stage in range(1, stages):
        last = stage == stages - 1
        for index in everyone:
            place = stage - first_stage[index]
            if not products[index] or place < 0:
                continue
            begins = place == 0
            read = from_grad(index) if begins and index not in copied else from_scratch(index)
            written = 0 if begins and index not in copied else 1 - in_scratch[index]
            problem = products[index][place]
            row = product(index, problem, read, written, kronecker_at)
            across, down = product_grid(index, problem, row)
            if last:
                build.state(row, index)
                build.sums(row, across * down, across * down, 1)
        build.launch("project_adam" if last else "project")

    # -- back 1 .. k, the last applies; the order of modes does not matter
    for stage in range(backs):
        last = stage == backs - 1
        for index in everyone:
            place = stage - (backs - len(products[index]))
            if not products[index] or place < 0:
                continue
            problem = products[index][place]
            row = product(index, problem, from_scratch(index), None if last else 1 - in_scratch[index], kronecker_at)
            product_grid(index, problem, row)
            if last:
                build.state(row, index)
        if not last:
            build.launch("back")
    for index in waiting:
        row = build.row(NUMEL=numels[index], INDEX=index, PARAM_DTYPE=DTYPES.index(param_dtypes[index]))
        scratch(row, X, index, 0)
        build.state(row, index)
        build.blocks(row, APPLY, math.ceil(numels[index] / BLOCK), vectors(index))
    build.launch("project_apply")

    return build.tables(starts[-1], kronecker_numel)


def is_too_large(layout: Layout) -> bool:
    """Whether a parameter or one of its matrices is beyond the kernels' int32 offsets."""
    return max(layout.numel, *(group.width**2 for group in layout.groups if group.modes), 0) > MAX_NUMEL


def can_reexpress(layout: Layout) -> bool:
    """Whether :func:`make_reexpress_tables` takes a parameter: a row has room for the orders of MAX_FACTORS modes."""
    return len(layout.modes) <= MAX_FACTORS and not is_too_large(layout)


def make_reexpress_tables(layouts: Sequence[Layout], due: Sequence[Sequence[int]], aligned: Sequence[bool]) -> Tables:
    """Lay out the launches that re-express m and v of refreshed parameters: products and v's permutation side by side.

    m goes to scratch and back with every product, v to the other scratch buffer and back. Kronecker products are made by the
    first launch and used from the second on.

    Args:
        layouts: of the parameters with due units.
        due: for each the places in ``layout.modes`` that are due.
        aligned: as in :func:`make_tables`.

    Returns:
        Tables; where :meth:`Tables.fill` wants a basis it takes the mode's rotation (an identity for a mode that is not due
        but shares a Kronecker product with one that is), for a Gram its order, and for "step" the parameter's outcomes.
    """
    build = _Builder(layouts, [0] * len(layouts))
    starts = np.concatenate([[0], np.cumsum([padded(layout.numel) for layout in layouts])]).tolist()
    stages: list[list[Callable[[], None]]] = []  # what each launch does
    kronecker_numel = 0

    def at(stage: int, function: Callable[[], None]) -> None:
        while len(stages) <= stage:
            stages.append([])
        stages[stage].append(function)

    def row(index: int, **columns: int) -> int:
        place = build.row(UNITS=len(due[index]), **columns)
        build.of_parameter(place, OUTCOMES, index, "step")
        return place

    def blocks(index: int, kind: int, source: str, target: str, modes: Sequence[int] = ()) -> None:
        """An elementwise pass over one parameter, from a state tensor or a scratch buffer to the other."""
        layout = layouts[index]
        place = row(index, NUMEL=layout.numel, COUNT=len(modes))
        for column, name in ((X, source), (Y, target)):
            if name in SHARED:
                build.of_shared(place, column, name, 4 * starts[index])
            else:
                build.of_parameter(place, column, index, name)
        for number, mode in enumerate(modes):
            build.point(place, FACTORS + 2 * number, build.gram + build.first_mode[index] + mode)
            build.rows[place][FACTORS + 2 * number + 1] = layout.sizes[mode] + (strides[index][mode] << 32)
        build.blocks(place, kind, math.ceil(layout.numel / BLOCK), aligned[index] and layout.numel % 4 == 0)

    def kronecker(index: int, problem: Problem, offset: int) -> None:
        place = row(index, DEPTH=problem.depth, COUNT=len(problem.factors))
        build.of_shared(place, Y, "kronecker", offset)
        for number, factor in enumerate(problem.factors):
            build.point(place, FACTORS + 2 * number, build.basis + build.first_mode[index] + factor)
            build.rows[place][FACTORS + 2 * number + 1] = layouts[index].sizes[factor]
        build.grid(place, KRONECKER, 1, 1)

    def product(index: int, problem: Problem, forth: bool, offset: int | None) -> None:
        place = row(index, DEPTH=problem.depth, INNER=problem.inner, COLUMNS=problem.columns)
        state, buffer = (X, Y) if forth else (Y, X)
        build.of_parameter(place, state, index, "exp_avg")
        build.of_shared(place, buffer, "scratch_0", 4 * starts[index])
        if offset is None:
            build.point(place, MATRIX, build.basis + build.first_mode[index] + problem.factors[0])
        else:
            build.of_shared(place, MATRIX, "kronecker", offset)
        kind = kind_of(problem, aligned[index])
        tile = TILES[kind // 4]
        build.grid(place, kind, math.ceil(problem.depth / tile.wide), math.ceil(problem.columns / tile.long))

    strides = [mode_strides(layout) for layout in layouts]
    for index, layout in enumerate(layouts):
        at(0, partial(blocks, index, PERMUTE, "exp_avg_sq", "scratch_1", due[index]))
        at(1, partial(blocks, index, COPY, "scratch_1", "exp_avg_sq"))
        problems = [problem for problem in problems_of(layout) if not set(problem.factors).isdisjoint(due[index])]
        stage = 1 if len(problems[0].factors) > 1 else 0
        for number, problem in enumerate(problems):
            offset = None
            if len(problem.factors) > 1:
                offset = 4 * kronecker_numel
                kronecker_numel += padded(problem.depth**2)
                at(0, partial(kronecker, index, problem, offset))
            at(stage + number, partial(product, index, problem, number % 2 == 0, offset))
        if len(problems) % 2 == 1:
            at(stage + len(problems), partial(blocks, index, COPY, "scratch_0", "exp_avg"))
    for stage in stages:
        for function in stage:
            function()
        build.launch("reexpress")
    return build.tables(starts[-1], kronecker_numel)


def mode_strides(layout: Layout) -> list[int]:
    """For each of layout.modes how far apart its neighbours lie in [D_1, ..., D_k] memory."""
    strides = [0] * len(layout.modes)
    behind = layout.numel
    for group in layout.groups:
        behind //= group.width
        inside = group.width
        for mode, size in zip(group.modes, group.sizes):
            inside //= size
            strides[layout.modes.index(mode)] = behind * inside
    return strides


def padded(numel: int) -> int:
    """Up to a multiple of 16 bytes, so that every piece of scratch is as aligned as its buffer."""
    return -(-numel // 4) * 4
