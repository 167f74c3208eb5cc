"""The tables that a launch for all parameters reads: ragged problems, tiles, pointers, scratch.

A *problem* is one product, one Gram or one elementwise pass of one parameter: a row of int64 (pointers, sizes). A *tile* is
the work of one program of a launch: (row of problems, kind, r, c) as int32. kernels/README.md works three parameters through.

Everything here is derived from layouts, dtypes and pointers, and disposable. The module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..layout import Layout
from . import columns as columns_module
from .columns import (
    ADAM_GRAD,
    ADAM_SCRATCH,
    APPLY,
    BLOCK,
    COPY,
    COUNT,
    COUNTER,
    DTYPES,
    EXP_AVG,
    EXP_AVG_SQ,
    FACTORS,
    GROUP,
    KRONECKER,
    MATRIX,
    NORM,
    PARAM,
    SKIPPED,
    SLOT,
    STEP,
    TILES,
    WIDTH,
    X,
    Y,
)
from .problems import Problem, gram_splits, gram_tiles, kind_of, padded, problems_of


@dataclass
class Launch:
    """One launch: tiles [first, first + count) of the table of tiles."""

    kernel: str  # "project_first", "gram_ema", "project", "project_adam", "back", "project_apply" or "reexpress"
    grad_dtype: str  # one of DTYPES; "float32" in launches that read scratch
    first: int
    count: int


@dataclass
class Tables:
    """The tables of one step, or of one refresh, on one device.

    Attributes:
        launches: the launches, in their order.
        tiles: [T, 4] int32.
        problems: [R, WIDTH] int64; :meth:`fill` fills the pointers in.
        scratch_numel: elements of each of the two scratch buffers (float32).
        partials_numel, counters: elements of partial sums (float32), arrival counters (int32).
        kronecker_numel: elements of all Kronecker products (float32).
    """

    launches: list[Launch]
    tiles: npt.NDArray[np.int32]
    problems: npt.NDArray[np.int64]
    scratch_numel: int
    partials_numel: int
    counters: int
    kronecker_numel: int
    _places: npt.NDArray[np.int64] = field(repr=False)  # [n] flat indices of the pointers in problems
    _sources: npt.NDArray[np.int64] = field(repr=False)  # [n] index of each pointer among the arguments of fill
    _offsets: npt.NDArray[np.int64] = field(repr=False)  # [n] bytes to add to it

    @property
    def nbytes(self) -> int:
        """Bytes that the plan keeps on the device, without the scratch buffers, which all plans on a stream share."""
        tables = self.tiles.nbytes + self.problems.nbytes
        return tables + 4 * (self.partials_numel + self.counters + self.kronecker_numel)

    def fill(self, pointers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """problems with these pointers: [P * len(per_parameter) + 2 * modes + len(SHARED)] int64, in the builder's order."""
        self.problems.reshape(-1)[self._places] = pointers[self._sources] + self._offsets
        return self.problems


# The order of the pointers for Tables.fill: those of each parameter, then both lists of matrices or orders, a pointer for each
# mode, then SHARED. In the tables of a step these are PER_PARAMETER, the bases and the Grams.
PER_PARAMETER = ("grad", "param", "exp_avg", "exp_avg_sq", "step", "skipped")
SHARED = ("scratch_0", "scratch_1", "kronecker")


class Builder:
    """Collects rows, pointers and tiles while the launches are laid out one after the other.

    Attributes:
        per_parameter: names of the pointers that each parameter has.
        first_list, second_list: the sources of the first pointers of both lists that run over the modes.
    """

    per_parameter: tuple[str, ...]

    def __init__(self, layouts: Sequence[Layout], groups: Sequence[int], aligned: Sequence[bool]) -> None:
        self.layouts, self.groups, self.aligned = layouts, groups, aligned  # for each parameter
        self.rows: list[list[int]] = []
        self.places: list[tuple[int, int, int]] = []  # (flat index in problems, source, offset in bytes)
        self.tiles: list[npt.NDArray[np.int32]] = []
        self.launches: list[Launch] = []
        self.pending: list[npt.NDArray[np.int32]] = []
        # the first counters, one for each group, count the parameters whose norm is known
        self.partials, self.counters = 0, 1 + max(groups, default=0)
        parameters = len(layouts)
        self.first_mode = np.concatenate([[0], np.cumsum([len(layout.modes) for layout in layouts])]).tolist()
        modes = self.first_mode[-1]
        self.first_list = len(self.per_parameter) * parameters
        self.second_list = self.first_list + modes
        self.shared = self.second_list + modes

    def row(self, **columns: int) -> int:
        values = [0] * WIDTH
        for name, value in columns.items():
            values[getattr(columns_module, name)] = value
        if "INDEX" in columns:
            values[GROUP] = self.groups[columns["INDEX"]]
        self.rows.append(values)
        return len(self.rows) - 1

    def point(self, row: int, column: int, source: int, offset: int = 0) -> None:
        self.places.append((row * WIDTH + column, source, offset))

    def of_parameter(self, row: int, column: int, index: int, name: str) -> None:
        self.point(row, column, index * len(self.per_parameter) + self.per_parameter.index(name))

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
        """Tiles (r, c) for r in across and c < down. r runs fastest, so that tiles that read the same columns run together."""
        r = np.asarray(range(across) if isinstance(across, int) else across, dtype=np.int32)
        tiles = np.empty((down * len(r), 4), dtype=np.int32)
        tiles[:, 0], tiles[:, 1] = row, kind
        tiles[:, 2] = np.tile(r, down)
        tiles[:, 3] = np.repeat(np.arange(down, dtype=np.int32), len(r))
        self.pending.append(tiles)

    def blocks(self, row: int, kind: int, count: int, vectors: bool) -> None:
        """Tiles of an elementwise pass. vectors: whether its elements may be read four at a time, which r tells the kernel."""
        self.grid(row, kind, [int(vectors)], count)

    def factors(self, row: int, index: int, problem: Problem, first: int) -> None:
        """Pointers and sizes of a problem's factors. first: the source of the first matrix of the parameter."""
        for place, factor in enumerate(problem.factors):
            self.point(row, FACTORS + 2 * place, first + factor)
            self.rows[row][FACTORS + 2 * place + 1] = self.layouts[index].sizes[factor]

    def product_grid(self, index: int, problem: Problem, row: int) -> tuple[int, int]:
        kind = kind_of(problem, self.aligned[index])
        tile = TILES[kind // 4]
        across, down = math.ceil(problem.depth / tile.wide), math.ceil(problem.columns / tile.long)
        self.grid(row, kind, across, down)
        return across, down

    def vectors(self, index: int) -> bool:
        """Whether the elements of a parameter may be read four at a time."""
        return self.aligned[index] and self.layouts[index].numel % 4 == 0

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


class Kinds(NamedTuple):
    """The properties of each parameter that the tables of a step depend on, but for pointers and their alignment."""

    layouts: tuple[Layout, ...]
    grad_dtypes: tuple[torch.dtype, ...]
    param_dtypes: tuple[torch.dtype, ...]
    normalize_grads: tuple[bool, ...]  # whether the update waits for its rms
    groups: tuple[int, ...]  # number of the param group, from 0 on; a group's parameters are neighbours

    @classmethod
    def of(cls, layouts: Sequence[Layout], dtype: torch.dtype = torch.float32, normalize_grads: bool = False) -> Kinds:
        """The kinds of one group's parameters, all of one dtype, as are their gradients."""
        count = len(layouts)
        return cls(tuple(layouts), (dtype,) * count, (dtype,) * count, (normalize_grads,) * count, (0,) * count)


def make_tables(kinds: Kinds, aligned: Sequence[bool]) -> Tables:
    """Lay out the launches of a step: project 1 (with norms and Kronecker products), the Grams, project 2 .. k (the last with
    Adam), back 1 .. k (the last with apply).

    A parameter with fewer products than others starts its projections, and its back-projections, later. So for all parameters
    Adam is the epilogue of the same launch, and the application is the epilogue of the last launch. The first launch only takes
    the norm of a parameter that starts later.

    Args:
        aligned: for each parameter, whether all its pointers are multiples of 16 bytes.
    """
    step = StepTables(kinds, aligned)
    for dtype in DTYPES:
        step.project_first(dtype)
    for dtype in DTYPES:
        step.grams(dtype)
    for stage in range(1, step.stages):
        step.project(stage)
    for stage in range(step.backs):
        step.back(stage)
    step.apply()
    return step.tables(step.starts[-1], step.kronecker_numel)


def name_of(dtype: torch.dtype) -> str:
    """The name of the dtype in DTYPES."""
    return str(dtype).removeprefix("torch.")


class StepTables(Builder):
    """The launches of a step, one method for each, called in the order of :func:`make_tables`. The same arguments. The lists of
    pointers are the bases and the Grams.

    Attributes:
        stages: the number of projection launches.
        backs: the number of back-projection launches.
        starts: [P + 1] elements of scratch before each parameter's part.
        kronecker_numel: elements of all Kronecker products so far.
    """

    per_parameter = PER_PARAMETER

    def __init__(self, kinds: Kinds, aligned: Sequence[bool]) -> None:
        super().__init__(kinds.layouts, kinds.groups, aligned)
        self.kinds = kinds
        self.grad_dtypes, self.param_dtypes = (list(map(name_of, d)) for d in (kinds.grad_dtypes, kinds.param_dtypes))
        self.products = [problems_of(layout) for layout in self.layouts]
        self.numels = [layout.numel for layout in self.layouts]
        self.starts: list[int] = np.concatenate([[0], np.cumsum([padded(numel) for numel in self.numels])]).tolist()
        # The first projection launch makes the Kronecker products, and so cannot use them yet.
        orders = [len(p) + (1 if p and len(p[0].factors) > 1 else 0) for p in self.products]
        self.stages = max(orders, default=0)
        self.backs = max((len(p) for p in self.products), default=0)
        self.first_stage = [self.stages - len(p) for p in self.products]  # 0-based launch of the first projection
        self.in_scratch = [0] * len(self.layouts)  # number of the buffer with the latest result of each parameter
        self.kronecker_at: dict[tuple[int, int], int] = {}  # (parameter, group of modes) -> bytes before its product
        self.kronecker_numel = 0
        self.copied: set[int] = set()  # parameters whose gradient was copied to scratch, as float32
        self.waiting: list[int] = []  # parameters without products that the last launch applies

    # ---- the rows of the launches ----

    def scratch(self, row: int, column: int, index: int, buffer: int) -> None:
        self.of_shared(row, column, f"scratch_{buffer}", 4 * self.starts[index])

    def product(self, index: int, problem: Problem, read: Callable[[int], None], written: int | None) -> int:
        """The row of one mode product. written: the scratch buffer of the result; None where the epilogue writes p."""
        row = self.row(
            DEPTH=problem.depth, INNER=problem.inner, COLUMNS=problem.columns, INDEX=index, NUMEL=self.numels[index],
            PARAM_DTYPE=DTYPES.index(self.param_dtypes[index]),
        )  # fmt: skip
        read(row)
        if written is not None:
            self.scratch(row, Y, index, written)
            self.in_scratch[index] = written
        if len(problem.factors) > 1:
            self.of_shared(row, MATRIX, "kronecker", self.kronecker_at[index, problem.mode_group])
        else:
            self.point(row, MATRIX, self.first_list + self.first_mode[index] + problem.factors[0])
        return row

    def elementwise(self, index: int, **columns: int) -> int:
        return self.row(NUMEL=self.numels[index], INDEX=index, **columns)

    def from_grad(self, index: int) -> Callable[[int], None]:
        return lambda row: self.of_parameter(row, X, index, "grad")

    def from_scratch(self, index: int) -> Callable[[int], None]:
        return lambda row: self.scratch(row, X, index, self.in_scratch[index])

    # ---- the launches ----

    def project_first(self, dtype: str) -> None:
        """Norms, Kronecker products, and the projections of the first stage, for gradients of this dtype."""
        for index in self.of_dtype(dtype):
            for problem in self.products[index]:
                if len(problem.factors) > 1:
                    self.kronecker_product(index, problem)
            if self.products[index] and self.first_stage[index] == 0:
                problem = self.products[index][0]
                row = self.product(index, problem, self.from_grad(index), 0)
                count = self.product_grid(index, problem, row)[1]
            else:
                row = self.elementwise(index)
                self.of_parameter(row, X, index, "grad")
                count = math.ceil(self.numels[index] / BLOCK)
                if self.products[index] and dtype != "float32":  # later launches read float32
                    self.copied.add(index)
                    self.scratch(row, Y, index, 0)
                self.blocks(row, COPY if index in self.copied else NORM, count, self.vectors(index))
            self.sums(row, count, count, 1)
            self.of_parameter(row, STEP, index, "step")
            self.of_parameter(row, SKIPPED, index, "skipped")
        self.launch("project_first", dtype)

    def kronecker_product(self, index: int, problem: Problem) -> None:
        self.kronecker_at[index, problem.mode_group] = 4 * self.kronecker_numel
        row = self.row(DEPTH=problem.depth, FACTOR_COUNT=len(problem.factors))
        self.of_shared(row, Y, "kronecker", 4 * self.kronecker_numel)
        self.kronecker_numel += padded(problem.depth**2)
        self.factors(row, index, problem, self.first_list + self.first_mode[index])
        self.grid(row, KRONECKER, 1, 1)

    def grams(self, dtype: str) -> None:
        """Grams of gradients of this dtype; Adam of parameters without products, or of all where no parameter has two."""
        indices = self.of_dtype(dtype)
        problems = [(index, problem) for index in indices for problem in self.products[index]]
        kinds = [kind_of(problem, self.aligned[index]) for index, problem in problems]
        tiles = [gram_tiles(problem, kind) for (_, problem), kind in zip(problems, kinds)]
        cut = gram_splits([(len(triangle), iterations) for triangle, iterations in tiles])
        each_gram = zip(kinds, tiles, cut)
        for index in indices:
            if not self.products[index] or self.stages == 1:
                self.adam(index)
            for problem, (kind, (triangle, _), splits) in zip(self.products[index], each_gram):
                self.gram_average(index, problem, kind, triangle, splits)
        self.launch("gram_ema", dtype)

    def adam(self, index: int) -> None:
        """Adam beside the Grams, from the gradient or from the result of the only projection."""
        row = self.elementwise(index, PARAM_DTYPE=DTYPES.index(self.param_dtypes[index]))
        count = math.ceil(self.numels[index] / BLOCK)
        if self.products[index]:
            self.scratch(row, X, index, 0)
            self.scratch(row, Y, index, 1)
            self.in_scratch[index] = 1
        else:
            self.of_parameter(row, X, index, "grad")
            self.scratch(row, Y, index, 0)
            self.waiting += [index] if self.kinds.normalize_grads[index] else []
        self.state(row, index)
        self.sums(row, count, count, 1)
        self.blocks(row, ADAM_SCRATCH if self.products[index] else ADAM_GRAD, count, self.vectors(index))

    def gram_average(self, index: int, problem: Problem, kind: int, triangle: list[int], splits: int) -> None:
        row = self.row(
            DEPTH=problem.depth,
            INNER=problem.inner,
            COLUMNS=problem.columns,
            INDEX=index,
            FACTOR_COUNT=len(problem.factors),
        )
        self.of_parameter(row, X, index, "grad")
        self.factors(row, index, problem, self.second_list + self.first_mode[index])
        stored = splits > 1 or len(problem.factors) > 1
        partials = stored * len(triangle) * splits * TILES[kind // 4].wide ** 2
        self.sums(row, partials, splits, stored * len(triangle))
        self.grid(row, kind, triangle, splits)

    def project(self, stage: int) -> None:
        """The projections of a stage after the first launch; the last stage has Adam as its epilogue."""
        last = stage == self.stages - 1
        for index in range(len(self.layouts)):
            place = stage - self.first_stage[index]
            if not self.products[index] or place < 0:
                continue
            from_grad = place == 0 and index not in self.copied
            read = self.from_grad(index) if from_grad else self.from_scratch(index)
            problem = self.products[index][place]
            row = self.product(index, problem, read, 0 if from_grad else 1 - self.in_scratch[index])
            across, down = self.product_grid(index, problem, row)
            if last:
                self.state(row, index)
                self.sums(row, across * down, across * down, 1)
        self.launch("project_adam" if last else "project")

    def back(self, stage: int) -> None:
        """The back-projections of a stage; the order of modes does not matter. :meth:`apply` launches the last stage."""
        last = stage == self.backs - 1
        for index in range(len(self.layouts)):
            place = stage - (self.backs - len(self.products[index]))
            if not self.products[index] or place < 0:
                continue
            problem = self.products[index][place]
            row = self.product(index, problem, self.from_scratch(index), None if last else 1 - self.in_scratch[index])
            self.product_grid(index, problem, row)
            if last:
                self.state(row, index)
        if not last:
            self.launch("back")

    def apply(self) -> None:
        """The last launch, with the parameters that wait for it and have no back-projection."""
        for index in self.waiting:
            row = self.elementwise(index, PARAM_DTYPE=DTYPES.index(self.param_dtypes[index]))
            self.scratch(row, X, index, 0)
            self.state(row, index)
            self.blocks(row, APPLY, math.ceil(self.numels[index] / BLOCK), self.vectors(index))
        self.launch("project_apply")

    def of_dtype(self, dtype: str) -> list[int]:
        """The parameters whose gradient has this dtype."""
        return [index for index, grad_dtype in enumerate(self.grad_dtypes) if grad_dtype == dtype]
