"""The tables of the launches that re-express m and v in refreshed bases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..layout import Layout
from .columns import BLOCK, COPY, FACTORS, KRONECKER, MATRIX, MAX_FACTORS, OUTCOMES, PERMUTE, X, Y
from .problems import Problem, is_too_large, padded, problems_of
from .tables import SHARED, Builder, Tables

# The pointers of each parameter; "outcomes" is the outcome of its first due unit
PER_PARAMETER = ("exp_avg", "exp_avg_sq", "outcomes")


def can_reexpress(layout: Layout) -> bool:
    """Whether :func:`make_reexpress_tables` can serve a parameter: a row has room for the orders of MAX_FACTORS modes."""
    return len(layout.modes) <= MAX_FACTORS and not is_too_large(layout)


def make_reexpress_tables(layouts: Sequence[Layout], due: Sequence[Sequence[int]], aligned: Sequence[bool]) -> Tables:
    """Lay out the launches that re-express m and v of refreshed parameters: products and v's permutation side by side.

    m goes to scratch and back, one way with every product; v goes to the other scratch buffer and back. The first launch makes
    the Kronecker products, and launches from the second on use them.

    Args:
        layouts: the layouts of the parameters with due units.
        due: for each parameter the indices in ``layout.modes`` that are due.
        aligned: as in :func:`make_tables`.

    Returns:
        Tables whose :meth:`Tables.fill` takes PER_PARAMETER for each parameter, then the rotation of every mode (an identity
        for a mode that is not due but shares a Kronecker product with a due one), the order of every mode, and SHARED.
    """
    build = ReexpressTables(layouts, due, aligned)
    for index in range(len(layouts)):
        build.parameter(index)
    for passes in build.stages:
        for make in passes:
            make()
        build.launch("reexpress")
    return build.tables(build.starts[-1], build.kronecker_numel)


class ReexpressTables(Builder):
    """The launches of :func:`make_reexpress_tables`, with the same arguments. The lists of pointers are rotations and orders.

    Attributes:
        stages: for each launch the functions that lay out its passes, each over one parameter.
        starts: [P + 1] elements of scratch before each parameter's part.
        kronecker_numel: elements of all Kronecker products so far.
    """

    per_parameter = PER_PARAMETER

    def __init__(self, layouts: Sequence[Layout], due: Sequence[Sequence[int]], aligned: Sequence[bool]) -> None:
        super().__init__(layouts, [0] * len(layouts), aligned)
        self.due = due
        self.starts: list[int] = np.concatenate([[0], np.cumsum([padded(layout.numel) for layout in layouts])]).tolist()
        self.stages: list[list[Callable[[], None]]] = []
        self.kronecker_numel = 0

    def parameter(self, index: int) -> None:
        """Lay out the passes over one parameter, each in its stage."""
        layout, due = self.layouts[index], self.due[index]
        self.at(0, self.elementwise, index, PERMUTE, "exp_avg_sq", "scratch_1", due)
        self.at(1, self.elementwise, index, COPY, "scratch_1", "exp_avg_sq")
        problems = [problem for problem in problems_of(layout) if not set(problem.factors).isdisjoint(due)]
        stage = 1 if len(problems[0].factors) > 1 else 0
        for number, problem in enumerate(problems):
            offset = None
            if len(problem.factors) > 1:
                offset = 4 * self.kronecker_numel
                self.kronecker_numel += padded(problem.depth**2)
                self.at(0, self.kronecker, index, problem, offset)
            self.at(stage + number, self.product, index, problem, number % 2 == 0, offset)
        if len(problems) % 2 == 1:
            self.at(stage + len(problems), self.elementwise, index, COPY, "scratch_0", "exp_avg")

    def at(self, stage: int, function: Callable[..., None], *arguments: Any) -> None:
        """Let the launch of this stage lay out ``function(*arguments)``."""
        while len(self.stages) <= stage:
            self.stages.append([])
        self.stages[stage].append(partial(function, *arguments))

    def row_of(self, index: int, **columns: int) -> int:
        row = self.row(UNITS=len(self.due[index]), **columns)
        self.of_parameter(row, OUTCOMES, index, "outcomes")
        return row

    def elementwise(self, index: int, kind: int, source: str, target: str, modes: Sequence[int] = ()) -> None:
        """A pass from a state tensor to a scratch buffer, or back. modes: the modes whose orders permute the elements."""
        layout = self.layouts[index]
        row = self.row_of(index, NUMEL=layout.numel, FACTOR_COUNT=len(modes))
        for column, name in ((X, source), (Y, target)):
            if name in SHARED:
                self.of_shared(row, column, name, 4 * self.starts[index])
            else:
                self.of_parameter(row, column, index, name)
        strides = mode_strides(layout) if modes else []
        for number, mode in enumerate(modes):
            self.point(row, FACTORS + 2 * number, self.second_list + self.first_mode[index] + mode)
            self.rows[row][FACTORS + 2 * number + 1] = layout.sizes[mode] + (strides[mode] << 32)
        self.blocks(row, kind, math.ceil(layout.numel / BLOCK), self.vectors(index))

    def kronecker(self, index: int, problem: Problem, offset: int) -> None:
        """A tile that makes the Kronecker product of a problem's rotations, [D, D] at ``offset`` bytes."""
        row = self.row_of(index, DEPTH=problem.depth, FACTOR_COUNT=len(problem.factors))
        self.of_shared(row, Y, "kronecker", offset)
        self.factors(row, index, problem, self.first_list + self.first_mode[index])
        self.grid(row, KRONECKER, 1, 1)

    def product(self, index: int, problem: Problem, forth: bool, offset: int | None) -> None:
        """A product that turns m, to scratch (forth) or back. offset: of the Kronecker product; None for a single rotation."""
        row = self.row_of(index, DEPTH=problem.depth, INNER=problem.inner, COLUMNS=problem.columns)
        state, buffer = (X, Y) if forth else (Y, X)
        self.of_parameter(row, state, index, "exp_avg")
        self.of_shared(row, buffer, "scratch_0", 4 * self.starts[index])
        if offset is None:
            self.point(row, MATRIX, self.first_list + self.first_mode[index] + problem.factors[0])
        else:
            self.of_shared(row, MATRIX, "kronecker", offset)
        self.product_grid(index, problem, row)


def mode_strides(layout: Layout) -> list[int]:
    """The stride of each of layout.modes in [D_1, ..., D_k] memory."""
    strides = [0] * len(layout.modes)
    after = layout.numel
    for group in layout.mode_groups:
        after //= group.width
        inside = group.width
        for mode, size in zip(group.modes, group.sizes):
            inside //= size
            strides[layout.modes.index(mode)] = after * inside
    return strides
