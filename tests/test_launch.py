"""The tables, checked as data: no Triton, no GPU."""

import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soap_opt.cuda import columns, configs, problems, stepper
from soap_opt.cuda import plan as plans
from soap_opt.cuda.columns import TILES
from soap_opt.cuda.problems import kind_of, problems_of
from soap_opt.cuda.tables import PER_PARAMETER, SHARED, Kinds, make_tables
from soap_opt.layout import layout_of


def layouts_of(shapes, max_precond_dim=10000, precondition_1d=False):
    options = {"max_precond_dim": max_precond_dim, "merge_dims": False, "data_format": "channels_first"}
    return [layout_of(shape, tuple(range(len(shape))), precondition_1d=precondition_1d, **options) for shape in shapes]


def tables_of(layouts, dtype="float32", normalize=False):
    return make_tables(Kinds.of(layouts, getattr(torch, dtype), normalize), [True] * len(layouts))


def test_the_worked_example_of_the_readme():
    tables = tables_of(layouts_of([(128, 64, 5, 5), (192, 128), (128,)]))
    found = []
    for each in tables.launches:
        tiles = tables.tiles[each.first : each.first + each.count]
        counts = Counter((int(row), int(kind)) for row, kind in tiles[:, :2])
        found.append((each.kernel, [(kind, count) for (_, kind), count in counts.items()]))
    assert found == [
        ("project_first", [(columns.KRONECKER, 1), (1, 50), (columns.NORM, 12), (columns.NORM, 1)]),
        ("gram_ema", [(1, 12), (0, 7), (6, 8), (1, 6), (3, 3), (columns.ADAM_GRAD, 1)]),
        ("project", [(0, 50), (1, 6)]),
        ("project_adam", [(6, 64), (3, 6)]),
        ("back", [(1, 50)]),
        ("back", [(0, 50), (1, 6)]),
        ("project_apply", [(6, 64), (3, 6)]),
    ]


SHAPE = st.lists(st.integers(1, 70), max_size=4).filter(lambda sizes: math.prod(sizes) < 1 << 17).map(tuple)


@settings(max_examples=60)
@given(
    shapes=st.lists(SHAPE, min_size=1, max_size=5),
    max_precond_dim=st.sampled_from([0, 8, 40, 10000]),
    precondition_1d=st.booleans(),
    dtype=st.sampled_from(columns.DTYPES),
    normalize=st.booleans(),
)  # fmt: skip
def test_every_element_is_covered_and_the_launches_are_few(shapes, max_precond_dim, precondition_1d, dtype, normalize):
    layouts = layouts_of(shapes, max_precond_dim, precondition_1d)
    tables = tables_of(layouts, dtype, normalize)
    most = max(len(layout.modes) for layout in layouts)
    assert len(tables.launches) <= (1 + 2 * most if most else 2 + normalize)

    written = Counter()
    for each in tables.launches:
        tiles = tables.tiles[each.first : each.first + each.count]
        assert len(np.unique(tiles, axis=0)) == len(tiles)  # no tile twice
        for row in np.unique(tiles[:, 0]):
            mine = tiles[tiles[:, 0] == row]
            values, kind = tables.problems[row], int(mine[0, 1])
            depth, total = int(values[columns.DEPTH]), int(values[columns.COLUMNS])
            if kind == columns.KRONECKER:
                continue
            if kind > 11:
                covered = len(mine) * columns.BLOCK - int(values[columns.NUMEL])
                assert 0 <= covered < columns.BLOCK
            elif each.kernel == "gram_ema":
                tile, splits = TILES[kind // 4], int(values[columns.COUNT])
                across = math.ceil(depth / tile.wide)
                assert len(mine) == across * (across + 1) // 2 * splits
                iterations = math.ceil(total / problems.gram_deep(kind // 4))
                assert splits == 1 or math.ceil(iterations / splits) >= problems.GRAM_MIN_ITERATIONS // 2
            else:
                tile = TILES[kind // 4]
                assert len(mine) == math.ceil(depth / tile.wide) * math.ceil(total / tile.long)
            finishes = each.kernel == "project_adam" or kind in (columns.ADAM_GRAD, columns.ADAM_SCRATCH)
            written[int(values[columns.INDEX])] += finishes
    assert written == {i: 1 for i in range(len(layouts))}  # Adam once for each parameter

    slots = []  # partial sums of different results do not overlap
    for row in tables.problems:
        assert 0 <= row[columns.SLOT] <= tables.partials_numel
    for each in tables.launches:
        for row in np.unique(tables.tiles[each.first : each.first + each.count, 0]):
            slots.append((int(tables.problems[row, columns.COUNTER]), int(row)))
    assert max((counter for counter, _ in slots), default=0) <= tables.counters


@pytest.mark.parametrize(("depth", "place"), [(1, 2), (16, 2), (17, 1), (32, 1), (33, 0), (10000, 0)])
def test_the_smallest_tile_that_holds_a_group(depth, place):
    assert kind_of(problems.Problem(0, 1, depth, 1, (0,)), False) // 4 == place


def test_alignment_needs_the_pointers_and_the_shape():
    assert kind_of(problems.Problem(0, 1, 64, 8, (0,)), True) == 1
    assert kind_of(problems.Problem(0, 1, 64, 8, (0,)), False) == 0
    assert kind_of(problems.Problem(0, 1, 64, 6, (0,)), True) == 0  # rows of six: every other vector would straddle
    assert kind_of(problems.Problem(0, 1, 66, 8, (0,)), True) == 0
    assert kind_of(problems.Problem(0, 9, 64, 1, (0,)), True) == 3


def test_a_sweep_overrides_how_kernels_are_compiled():
    changed = configs.overridden(configs.CONFIGS["sm_90"], "stages=2 gram_ema.warps=16 deep=64 precision=ieee")
    assert {config.stages for config in changed.values()} == {2}
    assert changed["gram_ema"].warps == 16 and changed["project"].warps == configs.CONFIGS["sm_90"]["project"].warps
    assert changed["project_adam"].deep == 64 and changed["due"].deep == 0
    assert configs.precision_of("tf32x3", "stages=2 precision=ieee") == "ieee"
    for wrong in ("warps", "warps=x", "warps=3", "deep=0", "deep=8", "stages=0", "gram.warps=4", "gram_ema.depth=4"):
        with pytest.raises(ValueError, match="SOAP_OPT_KERNELS"):
            configs.overridden(changed, wrong)
    with pytest.raises(ValueError, match="precision=bf16"):
        configs.precision_of("tf32x3", "precision=bf16")


def test_long_contractions_are_cut_where_a_launch_has_too_few_programs():
    def cut(*shapes):
        layouts = layouts_of(shapes)
        tables = tables_of(layouts)
        (gram,) = [each for each in tables.launches if each.kernel == "gram_ema"]
        return gram.count, 4 * tables.partials_numel / sum(4 * layout.numel for layout in layouts)

    assert cut((25, 100000))[0] > 64  # one tile alone
    # what a launch of many tiles was once cut into: partial sums of twice the gradient, and four times
    for shape in [(4096, 128256), (8192, 65536), (50257, 768)]:
        programs, share = cut(shape)
        assert share < 0.13, (shape, share)
    # where there are few tiles they may not be small: a bound for any model, 70 MB
    assert sum(problems.gram_splits([(1, 10**6)] * 700)) <= 2 * problems.GRAM_PROGRAMS


def test_kronecker_products_come_last():
    (layout,) = layouts_of([(5, 5, 40, 60)])
    assert [problem.depth for problem in problems_of(layout)] == [40, 60, 25]


def test_pointers_are_filled_in_where_they_belong():
    layouts = layouts_of([(6, 5), (4,)])
    tables = tables_of(layouts)
    count = len(PER_PARAMETER) * 2 + 2 * 2 + len(SHARED)
    filled = tables.fill(np.arange(1, count + 1, dtype=np.int64) << 32)
    first = tables.launches[0]
    row = filled[tables.tiles[first.first, 0]]
    assert row[columns.X] >> 32 == 1  # the first parameter's gradient
    assert row[columns.MATRIX] >> 32 == 1 + len(PER_PARAMETER) * 2  # the first basis
    assert row[columns.Y] >> 32 == count - len(SHARED) + 1  # scratch 0


def test_scratch_is_what_the_tables_ask_for():
    layouts = layouts_of([(6, 5), (4,), (3, 3, 3), (300, 40, 3, 3)])
    buffers, tables = 2 * 4 * tables_of(layouts).scratch_numel, tables_of(layouts).nbytes
    assert plans.scratch_bytes(layouts) == buffers + tables
    # (6, 5) and (4,) together, (3, 3, 3) after them, each with tables of its own
    few, last = layouts[:2], layouts[2:3]
    apart = tables_of(few).nbytes + tables_of(last).nbytes
    assert plans.scratch_bytes(layouts[:3], limit=8 * 40) == 2 * 4 * 36 + apart
    assert plans.scratch_bytes([]) == 0


def test_what_a_plan_keeps_is_what_the_report_counts():
    layouts = tuple(layouts_of([(6, 5), (4,), (70, 3000), (300, 40, 3, 3)]))
    plan = stepper.CudaStepper().plan_of(torch.zeros(1), Kinds.of(layouts), np.zeros(len(layouts), dtype=bool))
    kept = [plan.tiles, plan.problems.tensor, plan.partials, plan.counters, plan.kronecker]
    assert plan.tables.nbytes == sum(tensor.nbytes for tensor in kept)
    assert plan.partials.nbytes > 0.1 * plan.tables.nbytes  # (what was left out once)


def test_matrices_beyond_int32_offsets_are_not_for_the_kernels():
    small, wide, long = layouts_of([(6, 5), (50000, 2), (1 << 16, 1 << 15)], max_precond_dim=60000)
    assert [problems.is_too_large(layout) for layout in (small, wide, long)] == [False, True, True]
    assert plans.pieces_of((small, wide, small, small, long), sys.maxsize) == [[0], [1], [2, 3], [4]]
