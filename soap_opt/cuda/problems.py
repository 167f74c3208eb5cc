"""The products and Grams of a parameter, and how they are cut into tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..layout import Layout
from .columns import MAX_NUMEL, PACK, TILES
from .configs import CONFIGS

# The tables count a Gram's columns in iterations of this depth. It is the same for every architecture, so that tables are made
# without asking for a device.
GRAM_DEEP = CONFIGS["sm_90"]["gram_ema"].deep

# A Gram is cut along its columns where a launch would otherwise have too few programs, or one program that outlasts all others.
# A piece has at least GRAM_MIN_ITERATIONS iterations, and there are at most four times as many pieces as an H100 runs programs
# at a time (132 multiprocessors, two programs each). The numbers are the same on every GPU.
GRAM_MIN_ITERATIONS = 32
GRAM_PROGRAMS = 4 * 2 * 132


class Problem(NamedTuple):
    """One [A, D, B] view of a parameter that a matrix multiplies."""

    mode_group: int  # index in layout.mode_groups
    before: int  # A
    depth: int  # D
    inner: int  # B
    factors: tuple[int, ...]  # indices in layout.modes; several for a Kronecker product

    @property
    def columns(self) -> int:
        return self.before * self.inner


def problems_of(layout: Layout) -> list[Problem]:
    """A parameter's products in the order of their launches: Kronecker products last, because the first launch makes them."""
    problems, before = [], 1
    for place, group in enumerate(layout.mode_groups):
        before *= group.width
        if group.modes:
            factors = tuple(layout.modes.index(mode) for mode in group.modes)
            problems.append(Problem(place, before // group.width, group.width, layout.numel // before, factors))
    return sorted(problems, key=lambda problem: len(problem.factors) > 1)


def kind_of(problem: Problem, aligned: bool) -> int:
    """The tile's class, from the shape and whether every pointer is a multiple of 16 bytes."""
    place = next(i for i in reversed(range(len(TILES))) if problem.depth <= TILES[i].wide or i == 0)
    rows = problem.inner == 1
    # A vector is four neighbours in memory: four i of a row (B = 1), else four columns of one row. Q needs D % 4 == 0 too.
    aligned = aligned and place == 0 and problem.depth % 4 == 0 and (rows or problem.inner % 4 == 0)
    return 4 * place + 2 * rows + aligned


def gram_deep(place: int) -> int:
    """Columns of one iteration of a Gram whose tile is TILES[place]: narrower tiles take more columns."""
    return GRAM_DEEP << place


def gram_tiles(problem: Problem, kind: int) -> tuple[list[int], int]:
    """The tiles of a Gram's lower triangle, tile_i * PACK + tile_j, and the iterations over its columns."""
    across = math.ceil(problem.depth / TILES[kind // 4].wide)
    triangle = [i * PACK + j for i in range(across) for j in range(i + 1)]
    return triangle, math.ceil(problem.columns / gram_deep(kind // 4))


def gram_splits(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """The number of programs among which each tile of a Gram is cut along its columns, for the Grams of one launch. sizes: each
    Gram's tiles and iterations.

    GRAM_PROGRAMS programs would share the launch's iterations evenly, and only a tile that is longer than such a share is cut.
    So the partial sums (a tile for each program, written and read once) stay below 70 MB for any model.
    """
    share = max(GRAM_MIN_ITERATIONS, math.ceil(sum(tiles * iterations for tiles, iterations in sizes) / GRAM_PROGRAMS))
    return [max(1, math.ceil(iterations / share)) for _, iterations in sizes]


def is_too_large(layout: Layout) -> bool:
    """Whether a parameter or one of its matrices is beyond the kernels' int32 offsets."""
    return max(layout.numel, *(group.width**2 for group in layout.mode_groups if group.modes), 0) > MAX_NUMEL


def padded(numel: int) -> int:
    """numel, rounded up to a multiple of 16 bytes, so that every piece of scratch is as aligned as its buffer."""
    return -(-numel // 4) * 4
