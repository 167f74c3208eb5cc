"""The operators of csrc/library.cpp, each against its PyTorch counterpart."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparison import IMPLEMENTATIONS, NO_ENGINE, RAGGED, SoapRun, random_basis, random_gradients, random_params
from operator_arguments import (
    OPS,
    assert_same_tensors,
    call_step,
    gram_arguments,
    layouts_of,
    refresh_,
    snapshot,
    step_arguments,
)
from step_comparison import assert_eigenbasis, column_tolerance, gram_tolerance

from soap_opt import eigenbasis

pytestmark = pytest.mark.skipif(NO_ENGINE is not None, reason=str(NO_ENGINE))
POLICIES = ["together", "staggered", "adaptive"]


# ---- refresh_basis_ -----------------------------------------------------------------------------------------------------


SIZES = [1, 2, 3, 5, 16, 31, 32, 33, 64, 100, 200]


def spectrum_gram(values):
    q = random_basis(len(values), torch.float64)
    return q * values @ q.mT


def graded(d, low=-6, high=6):
    """Rows scaled from 1e-6 to 1e6, as where some channels of a layer hardly get a gradient."""
    x = torch.randn(d, d + 3, dtype=torch.float64) * torch.logspace(low, high, d, dtype=torch.float64)[:, None]
    return x @ x.mT


def full_rank(d):
    return spectrum_gram(torch.logspace(0, -3, d, dtype=torch.float64))


GRAMS = {
    "full rank": full_rank,
    "rank one": lambda d: torch.outer(x := torch.randn(d, dtype=torch.float64), x),
    "half the rank": lambda d: (x := torch.randn(d, (d + 1) // 2, dtype=torch.float64)) @ x.mT,
    "identity": lambda d: torch.eye(d, dtype=torch.float64),
    "zero": lambda d: torch.zeros(d, d, dtype=torch.float64),
    "one entry": lambda d: torch.diag(torch.arange(d) == d // 2).double(),
    "clusters": lambda d: spectrum_gram(torch.repeat_interleave(torch.tensor([3.0, 1.0, 0.1]).double(), d)[::3][:d]),
    "graded": graded,
    "tiny": lambda d: full_rank(d) * 1e-30,
    "huge": lambda d: full_rank(d) * 1e30,
    "dead channels": lambda d: graded(d, 0, -9),
}


def check_refresh(gram, basis, eps):
    """refresh_basis_ of one matrix against eigenbasis.refresh_basis from the same state."""
    d = gram.shape[0]
    got = basis.clone()
    orders, rotations = refresh_([gram], [got])
    want = eigenbasis.refresh_basis(basis, *eigenbasis.gram_times_basis(gram, basis))
    wide, identity = got.double(), torch.eye(d, dtype=torch.float64)

    def defect(q):
        return float((q.double().mT @ q.double() - identity).norm())

    # Householder's defect is a few eps sqrt(d); a factor for the luck of either
    assert defect(got) <= 3 * max(defect(want.basis), eps * d**0.5), (defect(got) / eps, defect(want.basis) / eps)
    assert orders[0].sort().values.equal(torch.arange(d))
    assert float((rotations[0].double() - basis.double().mT @ wide).norm()) <= 8 * eps * d
    # The order: that of eigenvalues that are told apart
    product, eigenvalues = eigenbasis.gram_times_basis(gram.double(), basis.double())
    sure = column_tolerance(gram, basis, 4 * eps * d**0.5, eps) < 0.05
    slack = 8 * eps * d * float(product.norm())
    ordered = eigenvalues[orders[0]]
    assert (ordered[:-1] - ordered[1:] >= -slack).all()
    if sure.any():
        tolerance = column_tolerance(gram, basis, 4 * eps * d**0.5, eps)[sure]
        signs = torch.where((wide * want.basis.double()).sum(0) < 0, -1.0, 1.0)
        error = (wide * signs - want.basis.double()).norm(dim=0)[sure]
        assert (error <= tolerance + 8 * eps * d**0.5).all(), (error / tolerance).max()
    return int(sure.sum())


STARTS = ["identity", "random", "eigenvectors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", GRAMS)
def test_refresh_basis(kind, start, dtype):
    torch.manual_seed(0)
    sure = 0
    for d in SIZES:
        gram = GRAMS[kind](d)
        gram = ((gram + gram.mT) / 2).to(dtype)
        if start == "identity":
            basis = torch.eye(d, dtype=dtype)
        elif start == "random":
            basis = random_basis(d, dtype)
        else:
            basis = eigenbasis.init_bases([gram])[0]
        sure += check_refresh(gram, basis, torch.finfo(dtype).eps)
    if kind == "full rank" and start == "eigenvectors":
        assert sure > 0.8 * sum(SIZES)  # the comparison of columns did compare


# Above 512 all threads share a basis, whose reflectors are applied 128 at a time: the last ones are 1, 88 and 1 here
LARGE = [513, 600, 641]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", GRAMS)
def test_refresh_of_a_large_basis(kind, dtype):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    for d, basis in zip(LARGE, (torch.eye(LARGE[0], dtype=dtype), *(random_basis(d, dtype) for d in LARGE[1:]))):
        gram = GRAMS[kind](d)
        sure = check_refresh(((gram + gram.mT) / 2).to(dtype), basis, torch.finfo(dtype).eps)
        if kind == "full rank" and dtype == torch.float64:
            assert sure > 0.8 * d  # the comparison of columns did compare


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refresh_has_the_same_bits_with_any_number_of_threads(dtype):
    torch.manual_seed(0)
    sizes = [*SIZES, *LARGE]
    kinds = [full_rank, GRAMS["dead channels"], GRAMS["half the rank"]]
    grams = [kinds[i % 3](d).to(dtype) for i, d in enumerate(sizes)]
    grams[-1] *= 1e-37  # some of its numbers are subnormal in float32
    bases = [random_basis(d, dtype) for d in sizes]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        own = [basis.clone() for basis in bases]
        orders, rotations = refresh_(grams, own)
        results.append([*own, *orders, *rotations])
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refresh_basis_decides_by_its_tolerance(dtype):
    torch.manual_seed(0)
    grams = [full_rank(d).to(dtype) for d in SIZES]
    bases = [eigenbasis.init_bases([gram])[0] if i % 2 else random_basis(len(gram), dtype) for i, gram in enumerate(grams)]
    grams += [torch.zeros(4, 4, dtype=dtype)]
    bases += [random_basis(4, dtype)]
    shares = [float(eigenbasis.off_diagonal_share(q, *eigenbasis.gram_times_basis(g, q))) for g, q in zip(grams, bases)]
    before = [q.clone() for q in bases]
    orders, rotations = refresh_(grams, bases, 0.01)
    changed = [not q.equal(old) for q, old in zip(bases, before)]
    assert changed == [share > 0.01 for share in shares]
    assert any(changed) and not all(changed)
    free = [q.clone() for q in before]
    free_orders, free_rotations = refresh_(grams, free)
    for i, d in enumerate([*SIZES, 4]):
        if changed[i]:
            assert bases[i].equal(free[i]) and orders[i].equal(free_orders[i]) and rotations[i].equal(free_rotations[i])
        else:
            assert orders[i].equal(torch.arange(d)) and rotations[i].equal(torch.eye(d, dtype=dtype))


def test_refresh_basis_of_a_mixture():
    """What a matrix becomes does not depend on what else is in the list."""
    torch.manual_seed(0)
    grams = [full_rank(d).to(dtype) for d in SIZES for dtype in (torch.float32, torch.float64)]
    bases = [random_basis(len(g), g.dtype) for g in grams]
    alone = [q.clone() for q in bases]
    results = refresh_(grams, bases)
    for i, g in enumerate(grams):
        order, rotation = refresh_([g], alone[i : i + 1])
        assert alone[i].equal(bases[i]) and order[0].equal(results[0][i]) and rotation[0].equal(results[1][i])


def test_refresh_basis_refuses_column_major_matrices():
    """(SOAP itself takes them: see test_tampered_state_takes_effect.)"""
    gram, basis = full_rank(4), random_basis(4, torch.float32)
    with pytest.raises(RuntimeError, match="not contiguous"):
        refresh_([gram], [basis.mT])


def test_the_order_of_equal_eigenvalues_is_kept():
    orders, _ = refresh_([torch.eye(d) for d in SIZES], [torch.eye(d) for d in SIZES])
    for order in orders:
        assert order.equal(torch.arange(len(order)))


# ---- init_basis ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_init_basis_of_a_mixture(threads):
    """Equal sizes go in batches, large ones alone, and neither may mix up whose is whose."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sizes = [3, 64, 1, 65, 3, 128, 520 if threads == 1 else 66, 16, 64, *[4] * 300, 3, 65]
    grams = [graded(d, -2, 2).to(torch.float64 if i % 3 == 0 else torch.float32) for i, d in enumerate(sizes)]
    grams += [torch.zeros(5, 5), torch.eye(7), torch.ones(6, 6), torch.zeros(0, 0)]
    grams = [g.mT.contiguous().mT if i % 5 == 0 else g for i, g in enumerate(grams)]
    before = [g.clone() for g in grams]
    bases = OPS.init_basis(grams)
    storages = {q.untyped_storage().data_ptr() for q in bases}
    assert len(storages) == len(bases)
    for gram, old, basis in zip(grams, before, bases):
        assert gram.equal(old)
        assert basis.is_contiguous() and basis.dtype == gram.dtype and basis.shape == gram.shape
        assert basis.untyped_storage().nbytes() == basis.nbytes, "keeps a whole batch alive"
        if len(gram):
            assert_eigenbasis(gram.double(), basis.double(), torch.finfo(gram.dtype).eps, f"{tuple(gram.shape)}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_init_basis_is_eigh(dtype):
    torch.manual_seed(0)
    grams = [full_rank(d).to(dtype) for d in SIZES]
    for gram, basis in zip(grams, OPS.init_basis(grams)):
        d, eps = len(gram), torch.finfo(dtype).eps
        want = torch.linalg.eigh(gram.double()).eigenvectors.flip(-1)
        signs = (want * basis.double()).sum(0).sign()
        values = torch.logspace(0, -3, d, dtype=torch.float64)
        gap = torch.minimum((values - values.roll(1)).abs(), (values - values.roll(-1)).abs()) if d > 1 else torch.ones(1)
        # Davis and Kahan: a backward error of a few d eps ||G||, divided by the gap
        assert ((basis.double() - want * signs).norm(dim=0) <= 10 * d * eps / gap).all()


# ---- gram_ema_ ----------------------------------------------------------------------------------------------------------


GRAM_SHAPES = [*RAGGED, (129, 130), (513, 9), (7, 600), (33, 17, 5, 5), (3, 129, 31), (20, 16, 3, 3)]


@pytest.mark.parametrize("scale", [None, 128.0])
@pytest.mark.parametrize(
    "grad_dtype,dtype",
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_gram_ema(grad_dtype, dtype, scale):
    arguments = gram_arguments(GRAM_SHAPES, grad_dtype, dtype, None if scale is None else torch.tensor([scale]), beta=0.7)
    grads, grams = arguments[:2]
    before = iter([x.clone() for x in grams])
    kept = [x.clone() for x in grads]
    norms = OPS.gram_ema_(*arguments)
    made = iter(grams)
    assert norms.dtype == torch.float64 and norms.shape == (len(grads),)
    eps = torch.finfo(dtype).eps
    for grad, old, norm, layout in zip(grads, kept, norms.tolist(), layouts_of(grads)):
        assert grad.equal(old)
        wide = grad.double() / (scale or 1)
        assert norm == pytest.approx(float(wide.square().sum()), rel=4 * eps * max(1, grad.numel()) ** 0.5)
        for outer in eigenbasis.outer_products(wide, layout):
            want = 0.7 * next(before).double() + 0.3 * outer
            got = next(made)
            tolerance = gram_tolerance(grad.numel() // len(got), eps)
            assert float((got.double() - want).norm()) <= tolerance * float(want.norm()), (tuple(grad.shape), len(got))
            assert got.equal(got.mT)


def test_gram_ema_leaves_the_grams_of_unusable_gradients_alone():
    shapes = [(4, 5), (6, 7), (8, 9), (3, 3, 3), (2, 2), (4, 4)]
    arguments = gram_arguments(shapes)
    grads, grams = arguments[:2]
    grads[0][1, 2] = math.inf
    grads[1][3, 3] = math.nan
    grads[2].fill_(1e19)  # finite, but the squared norm is 7.2e39
    grads[3].zero_()
    grads[4].fill_(1e-30)  # its squares vanish in float32
    before = [x.clone() for x in grams]
    norms = OPS.gram_ema_(*arguments)
    assert norms[0] == math.inf and norms[1].isnan() and norms[2] == pytest.approx(72e38, rel=1e-6)
    assert norms[3] == 0 and norms[4] == pytest.approx(4e-60, rel=1e-6) and norms[5] > 0
    for got, old in zip(grams[:6], before[:6]):
        assert got.equal(old)
    for got, old in zip(grams[6:11], before[6:11]):
        assert torch.allclose(got, 0.9 * old, rtol=1e-6)
    assert not grams[11].equal(before[11])


def test_gram_ema_of_gradients_that_are_not_contiguous():
    shapes = [(12, 10), (6, 4, 3, 3), (40, 33)]
    plain = gram_arguments(shapes)
    OPS.gram_ema_(*plain)
    for change in (lambda x: x.mT.contiguous().mT, lambda x: torch.stack([x, x], -1)[..., 0]):
        other = gram_arguments(shapes)
        other[0] = [change(x) for x in other[0]]
        other[1] = [x.mT.contiguous().mT for x in other[1]]
        OPS.gram_ema_(*other)
        assert all(a.equal(b) for a, b in zip(plain[1], other[1]))


# ---- step_ --------------------------------------------------------------------------------------------------------------


def test_step_leaves_unusable_gradients_alone():
    arguments = step_arguments()
    arguments["grads"][0][2, 3] = math.nan
    arguments["grads"][4].fill_(1e19)
    before = snapshot(arguments)
    outcomes = call_step(arguments)
    assert outcomes.tolist() == [-1 if i in (0, 4) else 0 for i in range(len(outcomes))]
    counts = [len(layout.modes) for layout in layouts_of(arguments["params"])]
    ends = list(itertools.accumulate(counts))
    for i in (0, 4):
        for name in ("params", "exp_avgs", "exp_avg_sqs", "state_steps"):
            assert arguments[name][i].equal(before[f"{name}[{i}]"])
        for name in ("grams", "bases"):
            for k in range(ends[i] - counts[i], ends[i]):
                assert arguments[name][k].equal(before[f"{name}[{k}]"])
    assert not arguments["params"][1].equal(before["params[1]"])


def test_scratch_s_contents_do_not_matter():
    plain, dirty = step_arguments(), step_arguments()
    dirty["scratch"].fill_(math.nan)
    call_step(plain)
    call_step(dirty)
    assert_same_tensors(dirty, snapshot(plain))


# Products of these are all loops and tiles, refreshes up to 32 too: no BLAS or LAPACK, whose results depend on the threads
OWN_CODE = [(32, 32), (16, 16, 5, 5), (3, 30, 5, 5), (31, 17, 3), (5, 32), *[(4, 4)] * 40, (2, 3, 2, 5, 3), (32,), ()]


def states(shapes, threads, steps=7, **options):
    torch.set_num_threads(threads)
    run = SoapRun(random_params(shapes), **IMPLEMENTATIONS["fused"], lr=0.01, precondition_frequency=2, **options)
    for row in random_gradients(shapes, steps, rank_one=0.1):
        run.step(row)
    return [x for i, p in enumerate(run.params) for x in (p.detach(), *run.state_of(i).values())]


def differences(refresh):
    """(threads, place, shape) of what two runs do not agree in."""
    found = []
    for threads, shapes in ((1, [*RAGGED, (60, 130), (40, 40, 5, 5), (520, 20)]), (2, [*RAGGED, (20, 20, 5, 5), (130, 7)])):
        first, second = (states(shapes, threads, steps=3, refresh=refresh) for _ in range(2))
        found += [(threads, i, tuple(a.shape)) for i, (a, b) in enumerate(zip(first, second)) if not a.equal(b)]
    return found


@pytest.mark.slow
def test_two_runs_give_the_same_bits():
    """In a process of its own: LAPACK's results follow the history of its threads, which here is that of every test before."""
    code = f"import test_operator_results as t; print([t.differences(refresh) for refresh in {POLICIES!r}])"
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, str(Path(__file__).parents[2])])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "[[], [], []]"


def test_any_number_of_threads_gives_the_same_bits_where_no_library_is_called():
    want = states(OWN_CODE, 1)
    for threads in (2, 3, 4):
        assert all(a.equal(b) for a, b in zip(want, states(OWN_CODE, threads))), threads


# ---- allocations --------------------------------------------------------------------------------------------------------


def test_a_steady_step_allocates_nothing_large():
    """The answer is a bool for each parameter, the lists are no tensors, and everything else is there already."""
    shapes = [(64, 64), (48, 48, 5, 5), (64, 48, 3, 3), (130, 33), (64,), *[(4, 4)] * 20]
    run = SoapRun(random_params(shapes), **IMPLEMENTATIONS["fused"], precondition_frequency=1000)
    gradients = random_gradients(shapes, 3)
    for row in gradients:
        run.step(row)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run.optimizer.step()
    events = profile.profiler.kineto_results.events()
    allocations = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    assert allocations, "the profiler saw no allocation at all, not even the result's"
    assert sum(allocations) <= 8 * len(shapes), allocations
