"""The tables of the launches that re-express m and v in refreshed bases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ..layout import Layout
from .columns import BLOCK, COPY, FACTORS, KRONECKER, MATRIX, MAX_FACTORS, OUTCOMES, PERMUTE, TILES, X, Y
from .problems import Problem, is_too_large, kind_of, padded, problems_of
from .tables import SHARED, Builder, Tables


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
    build = Builder(layouts, [0] * len(layouts))
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
    for functions in stages:
        for function in functions:
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
