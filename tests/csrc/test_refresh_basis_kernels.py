"""The CUDA refresh's own source, compiled by g++ and run on fibers (fibers.h says what that shows and what not)."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import (
    FAILED,
    KEPT,
    REFRESHED,
    SHARED_LIMITS,
    barriers,
    binary,
    compiler,
    launch,
    refresh,
    refresh_by_operator,
)
from matrices import EPS, KINDS, complaints, lapack, make, orthogonal, quality, recorded_grams

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench.refresh_kernels import latency  # noqa: E402

SMALL = (1, 2, 3, 5, 8, 16, 31, 32)  # a warp each
MEDIUM = (33, 64, 100, 128, 192, 224, 225)  # a block each
LARGE = (320, 512)  # panels
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def judge(matrices, results, where=""):
    """QR of matrices as they are: Q = I makes P = A exactly, and e its diagonal."""
    wrong = []
    for a, result in zip(matrices, results):
        d = len(a)
        assert result.outcome == REFRESHED
        assert np.array_equal(np.argsort(-np.diag(a), kind="stable"), result.order)
        wrong += [f"{where} d = {d}: {text}" for text in complaints(a[:, result.order], result.basis)]
        # I^T Q' sums exact zeros
        assert np.array_equal(result.rotation, result.basis)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_qr(kind):
    matrices = [make(kind, d) for d in (*SMALL, 33, 64, 100)]
    judge(matrices, refresh([(a, np.eye(len(a))) for a in matrices]), kind)


@pytest.mark.parametrize("d", (128, 192, 224, 225))
def test_qr_of_sizes_near_the_limit(d):
    matrices = [make(kind, d) for kind in ("gram", "row_scaled", "rank_deficient", "collinear")]
    judge(matrices, refresh([(a, np.eye(d)) for a in matrices]))


# 1024 takes two seconds each: four kinds here, all of them in bench/results/refresh_accuracy.csv
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, d",
    [(kind, d) for d in MEDIUM + LARGE for kind in KINDS]
    + [(kind, 1024) for kind in ("gram", "rank_deficient", "row_scaled", "huge")],
)
def test_qr_of_every_size(kind, d):
    a = make(kind, d, seed=1)
    judge([a], (refresh if d in MEDIUM else refresh_by_operator)([(a, np.eye(d))], seed=d), kind)


@pytest.mark.slow
def test_qr_of_2049():
    a = make("gram", 2049)
    judge([a], refresh_by_operator([(a, np.eye(2049))]))


def test_panels_of_several_batches():
    """Sizes and kinds mixed, on a device with little shared memory: no batch is another's."""
    problems = [
        (make(kind, d), orthogonal(d)) for d in (90, 60, 100) for kind in ("gram", "rank_deficient", "clustered", "tiny")
    ]
    together = refresh_by_operator(problems, limit=18432)
    for (gram, basis), result in zip(problems, together):
        assert result.outcome == REFRESHED
        judge_refresh(gram, basis, result)


@pytest.mark.parametrize("chip", SHARED_LIMITS)
def test_largest_block_of_a_chip(chip):
    """The size up to which a chip takes the block kernel; one more goes to the panels, which a launch counter shows."""
    limit = SHARED_LIMITS[chip]
    largest = {"sm_80": 194, "sm_86": 149, "sm_90": 231, "sm_100": 231}[chip]
    for d, launches in ((largest, 3), (largest + 1, -(-(largest + 1) // 32))):
        a = make("gram", d)
        done, results = launch([(a, np.eye(d))], limit=limit)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[1] == str(launches)
        judge([a], results)


@pytest.mark.parametrize("d", (70, 100))
def test_panels_that_outgrow_shared_memory(d):
    """A device with so little of it that some panels are factored where they lie."""
    a = make("condition_1e12", d)
    judge([a], refresh([(a, np.eye(d))], limit=16384))


def exact_product(gram, basis):
    product = gram.astype(np.float64) @ basis.astype(np.float64)
    return product, (basis * product).sum(0)


def judge_refresh(gram, basis, result):
    """A whole refresh, against float64's P and with what LAPACK makes of float32's P as the measure."""
    d = len(gram)
    product, estimates = exact_product(gram, basis)
    order = result.order
    assert sorted(order) == list(range(d))
    scale = np.linalg.norm(gram) + 1e-300
    assert (np.diff(estimates[order]) <= 4 * EPS * np.sqrt(d) * scale).all(), "eigenvalues do not fall"
    rounded = (gram @ basis)[:, order]
    reference = quality(product[:, order], lapack(rounded))
    assert not complaints(product[:, order], result.basis, reference)
    rotation = basis.astype(np.float64).T @ result.basis.astype(np.float64)
    assert np.linalg.norm(result.rotation - rotation) <= 4 * EPS * np.sqrt(d) * np.sqrt(d)


@pytest.mark.parametrize("kind", ("gram", "clustered", "condition_1e12", "rank_deficient", "tiny", "huge"))
def test_refresh(kind):
    problems = [(make(kind, d), orthogonal(d)) for d in (2, 5, 16, 25, 32, 33, 64, 130, 225)]
    for (gram, basis), result in zip(problems, refresh(problems)):
        assert result.outcome == REFRESHED
        judge_refresh(gram, basis, result)


def test_recorded_grams():
    """Grams of models in training, in the identity and in a basis of their own that has aged."""
    grams = list(recorded_grams().values())
    assert len(grams) >= 6
    judge(grams, refresh([(gram, np.eye(len(gram))) for gram in grams]))
    rng = np.random.default_rng(0)
    problems = []
    for gram in grams:
        noise = rng.standard_normal(gram.shape) * np.linalg.norm(gram) * 0.01 / len(gram)
        problems.append((gram, np.linalg.eigh(gram.astype(np.float64) + noise + noise.T)[1][:, ::-1].astype(np.float32)))
    for (gram, basis), result in zip(problems, refresh(problems)):
        judge_refresh(gram, basis, result)


def test_every_matrix_of_a_mixed_set_is_its_own():
    """A ragged set in one call gives, bit for bit, what each gives alone; under other seeds too."""
    problems = [(make("gram", d, seed=d), orthogonal(d)) for d in (5, 40, 3, 32, 100, 1, 33, 17, 8, 64, 16, 9)]
    together = refresh(problems)
    for seed in (2, 3):
        again = refresh(problems, seed=seed)
        for a, b in zip(together, again):
            assert all(np.array_equal(x, y) for x, y in zip(a, b))
    for problem, expected in zip(problems, together):
        (alone,) = refresh([problem])
        # blocks of another number of threads sum P's norm in another order, which decides nothing here
        assert all(np.array_equal(x, y) for x, y in zip(alone, expected))


SIZES_OF_EACH_KERNEL = (7, 16, 30, 40, 100)


@pytest.mark.parametrize("poison", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("where", ("gram", "basis"))
def test_what_is_not_finite_is_reported_and_changes_nothing(where, poison):
    problems = []
    for d in SIZES_OF_EACH_KERNEL:
        gram, basis = make("gram", d), orthogonal(d)
        (gram if where == "gram" else basis)[d // 2, d - 1] = poison
        problems.append((gram, basis))
        problems.append((make("gram", d, seed=1), orthogonal(d, seed=1)))  # neighbours are none the worse
    for i, ((gram, basis), result) in enumerate(zip(problems, refresh(problems))):
        if i % 2:
            judge_refresh(gram, basis, result)
            continue
        assert result.outcome == FAILED
        assert np.array_equal(result.basis, basis, equal_nan=True)
        assert np.array_equal(result.order, np.arange(len(gram)))
        assert np.array_equal(result.rotation, np.eye(len(gram)))


def test_what_is_not_due_is_left_alone():
    problems = [(make("gram", d), orthogonal(d), due) for d in SIZES_OF_EACH_KERNEL for due in (False, True)]
    for (gram, basis, due), result in zip(problems, refresh(problems)):
        assert result.outcome == (REFRESHED if due else KEPT)
        assert np.array_equal(result.basis, basis) != due
        if not due:
            assert np.array_equal(result.order, np.arange(len(gram)))
            assert np.array_equal(result.rotation, np.eye(len(gram)))


@pytest.mark.parametrize("d", SIZES_OF_EACH_KERNEL)
def test_adaptive(d):
    """off(Q^T G Q) / ||Q^T G Q||_F on either side of the tolerance; exact eigenvectors and G = 0 pass any."""
    gram, aged = make("gram", d), orthogonal(d)
    fresh = np.linalg.eigh(gram.astype(np.float64))[1][:, ::-1].astype(np.float32)
    rotated = aged.astype(np.float64).T @ gram @ aged
    share = np.linalg.norm(rotated - np.diag(np.diag(rotated))) / np.linalg.norm(rotated)
    problems = [(gram, aged), (gram, fresh), (np.zeros_like(gram), aged)]
    outcomes = [result.outcome for result in refresh(problems, tolerance=share * 0.99)]
    assert outcomes == [REFRESHED, KEPT, KEPT]
    outcomes = [result.outcome for result in refresh(problems, tolerance=share * 1.01)]
    assert outcomes == [KEPT, KEPT, KEPT]


def test_outcomes_of_a_mixed_set():
    """Due, not due, kept and failed matrices of every class of sizes in one call, in a full table and another: what each
    gives alone, bit for bit. (The workspace is full of NaNs, or of 1e30 with an even seed.)"""
    problems, expected = [], []
    for n, d in enumerate((33, 64, 65, 96, 100, 128, 129, 160, 40, 50, 20, 32)):
        gram, basis = make("gram", d, seed=n), orthogonal(d, seed=n)
        exact = np.linalg.eigh(gram.astype(np.float64))[1][:, ::-1].astype(np.float32)
        broken = gram.copy()
        broken[d - 1, 0] = (np.nan, np.inf)[n % 2]
        problems += [(gram, basis, True), (gram, basis, False), (gram, exact, True), (broken, basis, True)][: 2 + n % 3]
        expected += [REFRESHED, KEPT, KEPT, FAILED][: 2 + n % 3]
    assert sum(len(gram) > 32 for gram, *_ in problems) > 16  # rows of a table
    together = refresh(problems, tolerance=0.01)
    assert [result.outcome for result in together] == expected
    for (gram, basis, _), result in zip(problems, together):
        if result.outcome == REFRESHED:
            judge_refresh(gram, basis, result)
        else:
            assert np.array_equal(result.basis, basis)
            assert np.array_equal(result.order, np.arange(len(gram))) and np.array_equal(result.rotation, np.eye(len(gram)))
    for seed in (2, 3):
        for a, b in zip(together, refresh(problems, tolerance=0.01, seed=seed)):
            assert all(np.array_equal(x, y) for x, y in zip(a, b))
    for problem, result in zip(problems, together):
        (alone,) = refresh([problem], tolerance=0.01)
        assert all(np.array_equal(x, y) for x, y in zip(alone, result))


@pytest.mark.parametrize("d", (20, 40, 100, 130))
def test_a_power_of_two_changes_no_bit(d):
    gram, basis = make("gram", d), orthogonal(d)
    first, *others = refresh([(gram * np.float32(2.0**n), basis) for n in (0, -90, 60, 110)])
    for other in others:
        assert all(np.array_equal(x, y) for x, y in zip(first, other))


@pytest.mark.parametrize("exponents", ((-60, 0, 60, 0), (0, -100, -100, 0), (None, 20, None, -20)))
def test_strips_of_different_size(exponents):
    """The strips of 32 rows that tiles of G Q are made of have scales of their own; None: a strip of zeros."""
    a = make("gram", 120)
    for strip, exponent in enumerate(exponents):
        a[32 * strip : 32 * (strip + 1)] *= 0 if exponent is None else 2.0**exponent
    judge([a], refresh([(a, np.eye(len(a)))]))


@pytest.mark.parametrize("d", (33, 64, 100, 192))
def test_counted_latency(d):
    done, _ = launch([(make("gram", d), orthogonal(d))])
    counted = done.stdout.split()
    assert latency(d)["launches"] == int(counted[counted.index("launches") + 1])
    assert latency(d)["barriers"] == int(counted[counted.index("barriers") + 1])


# ---------------------------------------------------------------------------------------------- the tests can tell the wrong


def gram_schmidt(a):
    """Classical Gram-Schmidt in float32."""
    a = torch.from_numpy(a)
    q = torch.zeros_like(a)
    for j in range(len(a)):
        x = a[:, j] - q[:, :j] @ (q[:, :j].T @ a[:, j])
        q[:, j] = x / x.norm() if x.norm() > 0 else x
    return q.numpy()


def test_gram_schmidt_fails_the_gate():
    failing = {kind for kind in KINDS if complaints(make(kind, 64), gram_schmidt(make(kind, 64)))}
    assert failing >= {"rank_deficient", "nearly_rank_deficient", "collinear", "hilbert", "condition_1e12", "zero"}
    assert not complaints(make("identity", 64), gram_schmidt(make("identity", 64)))


PROBE = [(make("gram", d), orthogonal(d), d in (5, 12, 32, 40, 100)) for d in (5, 12, 32, 40, 100, 20, 44)]  # two not due
PROBE += [(make("blocks_apart", d), np.eye(d, dtype=np.float32), True) for d in (12, 30)]  # columns that are scaled


def caught(**options) -> bool:
    done, results = launch(PROBE, **options)
    if done.returncode != 0:
        return True
    try:
        for (gram, basis, due), result in zip(PROBE, results):
            if due:
                judge_refresh(gram, basis, result)
            else:
                assert result.outcome == KEPT and (result.basis == basis).all()
                assert (result.order == np.arange(len(gram))).all() and (result.rotation == np.eye(len(gram))).all()
    except AssertionError:
        return True
    return False


def test_probe_passes():
    assert not any(caught(seed=seed, limit=limit) for seed in range(3) for limit in (30000, 232448))


@pytest.mark.parametrize("place, text", barriers().values(), ids=barriers())
def test_a_missing_barrier_is_caught(place, text):
    # limit: the matrix of 100 goes through the block kernel with one, through the panels with the other
    assert any(caught(skip=place, seed=seed, limit=limit) for seed in range(3) for limit in (232448, 30000)), text


@pytest.mark.slow
@pytest.mark.parametrize(
    "right, wrong, kind",
    [
        ("-copysignf(sqrtf", "copysignf(sqrtf", None),  # cancellation in alpha - beta
        ("const float scale = power_of_two_scale(", "const float scale = 1 + 0 * power_of_two_scale(", "huge"),
        ("below + alpha * alpha < kTinySquare", "false", "blocks_apart"),
        ("-taus[c] * sum", "taus[c] * sum", "gram"),
        ("int l = row; l <= column", "int l = row; l < column", "gram"),
        ("entry *= scales[i / kTile]", "entry *= 1", "row_scaled"),
        ("if (first_column == 0 && threadIdx.x == 0) work.largest", "if (false) work.largest", "gram"),
    ],
)
def test_wrong_kernels_are_caught(right, wrong, kind):
    program = binary(change=(right, wrong))
    kinds = KINDS if kind is None else [kind]
    matrices = [make(kind, d) for kind in kinds for d in (16, 40, 64)]
    with pytest.raises(AssertionError):
        judge(matrices, refresh([(a, np.eye(len(a))) for a in matrices], program=program))
        judge(matrices[-1:], refresh([(matrices[-1], np.eye(64))], program=program, limit=16384))


@pytest.mark.slow
def test_a_basis_that_is_not_orthogonal_is_not_written():
    """Reflectors that are none: what the block made is thrown away, and nothing was written before it was tried."""
    program = binary(change=("entry * reflector.inverse", "entry * reflector.inverse * 1.01f"))
    problems = [(make("gram", d), orthogonal(d)) for d in (40, 64, 100, 150, 16)]
    for (gram, basis), result in zip(problems, refresh(problems, program=program)):
        if len(gram) <= 32:  # (the warps' kernel has code of its own)
            assert result.outcome == REFRESHED
            continue
        assert result.outcome == FAILED
        assert np.array_equal(result.basis, basis)
        assert np.array_equal(result.order, np.arange(len(gram))) and np.array_equal(result.rotation, np.eye(len(gram)))


def needs_asan():
    found = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("g++ has no libasan here")


@pytest.mark.slow
def test_sanitizers():
    """AddressSanitizer and UBSan over every kernel, blocks of 512 threads too; the same results as without."""
    needs_asan()
    program = binary(*SANITIZERS)
    problems = [(make("gram", d), orthogonal(d)) for d in (1, 2, 7, 16, 32, 33, 47, 64, 100, 140)]
    for limit in (232448, 30000, 18432):
        for (gram, basis), result in zip(problems, refresh(problems, program=program, limit=limit)):
            judge_refresh(gram, basis, result)


@pytest.mark.slow
@pytest.mark.parametrize("d", (7, 47))
def test_the_sanitizer_sees_an_overrun(d):
    needs_asan()
    overrun = ("i < d; i += threads) matrix.order[i] = i;", "i <= d; i += threads) matrix.order[i] = i;")
    done, _ = launch([(make("gram", d), orthogonal(d), False)], program=binary(*SANITIZERS, change=overrun))
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


# ---------------------------------------------------------------------------------------------------------------- convergence


def angle(gram, basis):
    """off(Q^T G Q) / ||G||_F in float64: 0 for eigenvectors."""
    rotated = basis.astype(np.float64).T @ gram.astype(np.float64) @ basis.astype(np.float64)
    return np.linalg.norm(rotated - np.diag(np.diag(rotated))) / np.linalg.norm(gram)


@pytest.mark.parametrize("d", (5, 24, 48))
def test_repeated_refreshes_converge_on_a_fixed_gram(d):
    """Orthogonal iteration: every refresh shrinks column j's angle by e_{j+1} / e_j, here 1/2."""
    rng = np.random.default_rng(d)
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    gram = (q * 0.5 ** np.arange(d) @ q.T).astype(np.float32)
    basis = orthogonal(d)
    for _ in range(40):
        (result,) = refresh([(gram, basis)])
        basis = result.basis
    assert angle(gram, basis) < 8 * EPS
    exact = np.linalg.eigh(gram.astype(np.float64))[1][:, ::-1]
    known = min(d, 10)  # e_j > 1e-3: beyond, float32's rounding of the Gram itself turns the eigenvectors
    overlap = abs((basis[:, :known] * exact[:, :known]).sum(0))
    assert (overlap > 1 - 1e-4).all(), overlap


def test_refreshes_follow_a_drifting_gram():
    """A Gram that turns a little between refreshes: the basis follows, without ever seeing an eigh.

    Its lag is a geometric series of past turns, 1 / (1 - e_{j+1} / e_j) = 3.3 of them; a basis that stays lags all 60.
    """
    d, rng = 40, np.random.default_rng(0)
    q, turn = np.linalg.qr(rng.standard_normal((d, d)))[0], 0.0005 * rng.standard_normal((d, d))
    turn = np.linalg.qr(np.eye(d) + turn - turn.T)[0]
    turn = turn * np.sign(np.diag(turn))
    values = 0.7 ** np.arange(d)
    basis = still = q.astype(np.float32)
    for _ in range(60):
        q = turn @ q
        gram = (q * values @ q.T).astype(np.float32)
        (result,) = refresh([(gram, basis)])
        basis = result.basis
    assert angle(gram, basis) < 0.1 * angle(gram, still)
