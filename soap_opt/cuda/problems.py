"""The products and Grams of a parameter, and how they are cut into tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..layout import Layout
from .columns import MAX_NUMEL, PACK, TILES
from .configs import CONFIGS

# What the tables count in; the same for every architecture, so that a table is made without asking for a device.
GRAM_DEEP = CONFIGS["sm_90"]["gram_ema"].deep

# A Gram is cut along its columns where a launch would otherwise have too few programs, or one that outlasts all the others:
# into pieces of at least so many iterations, and no more pieces than four times what an H100 runs at a time (132
# multiprocessors, two programs each). The number is the same on every GPU.
GRAM_MIN_ITERATIONS = 32
GRAM_PROGRAMS = 4 * 2 * 132


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


def is_too_large(layout: Layout) -> bool:
    """Whether a parameter or one of its matrices is beyond the kernels' int32 offsets."""
    return max(layout.numel, *(group.width**2 for group in layout.groups if group.modes), 0) > MAX_NUMEL


def padded(numel: int) -> int:
    """Up to a multiple of 16 bytes, so that every piece of scratch is as aligned as its buffer."""
    return -(-numel // 4) * 4
