"""soap_opt::refresh_basis_ and init_basis: the engine's on the CPU, the CUDA one on fibers and (where there is a GPU) on it.

On fibers everything of csrc/cuda runs that does not need a GPU: which matrix goes to which kernel, the kernels, and the blocked
QR with its panels; ATen's products are the CPU's.
"""

import numpy as np
import pytest
import step_comparison
import torch
from harness import FAILED, KEPT, REFRESHED, SHARED_LIMITS
from matrices import EPS, KINDS, complaints, make, orthogonal
from test_refresh_basis_kernels import angle, judge_refresh

from soap_opt import _ext
from soap_opt.eigenbasis import gram_times_basis, init_bases, refresh_basis

SMALL_DEVICE = (
    18432  # bytes of shared memory: the block kernel up to d = 55, then panels, from d = 79 on partly in global memory
)


def results_for(bases):
    """Orders, rotations and outcomes to be written, full of what must not stay."""
    return (
        [torch.full((len(basis),), -1, dtype=torch.int64, device=basis.device) for basis in bases],
        [torch.full_like(basis, torch.nan) for basis in bases],
        torch.full((len(bases),), -1, dtype=torch.int32, device=bases[0].device),
    )


class Implementation:
    """The operators of one implementation, for tensors that come from the CPU."""

    def __init__(self, name, operators, device):
        self.name, self.operators, self.device = name, operators, device

    def refresh(self, grams, bases, tolerance=-1.0, due=None):
        """Results on the CPU; the bases are written in place."""
        moved = [basis.to(self.device) for basis in bases]
        due = None if due is None else torch.tensor(due, device=self.device)
        results = orders, rotations, outcomes = results_for(moved)
        self.operators.refresh_basis_([g.to(self.device) for g in grams], moved, *results, tolerance, due)
        for basis, new in zip(bases, moved):
            basis.copy_(new)
        return [order.cpu() for order in orders], [rotation.cpu() for rotation in rotations], outcomes.tolist()

    def init(self, grams):
        return [basis.cpu() for basis in self.operators.init_basis([gram.to(self.device) for gram in grams])]


@pytest.fixture(params=["cpu", "fibers", "fibers_of_a_small_device", "cuda"])
def implementation(request) -> Implementation:
    if request.param.startswith("fibers"):
        operators = request.getfixturevalue("fibers")
        operators.configure(1, SHARED_LIMITS["sm_90"] if request.param == "fibers" else SMALL_DEVICE)
        return Implementation(request.param, operators, "cpu")
    if _ext._load_error is not None:
        pytest.skip(_ext._load_error)
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if _ext._cuda_load_error is not None:
            pytest.skip(_ext._cuda_load_error)
    return Implementation(request.param, torch.ops.soap_opt, request.param)


def problems(sizes, seed=0):
    grams = [torch.from_numpy(make("gram", d, seed=seed + i)) for i, d in enumerate(sizes)]
    return grams, [torch.from_numpy(orthogonal(d, seed=seed + i)) for i, d in enumerate(sizes)]


SIZES = (5, 48, 3, 100, 32, 1, 33, 16, 100, 64, 65, 2)


def test_against_the_specification(implementation):
    """Q' column by column where P determines it, the rotation, the order; every matrix of a ragged set."""
    grams, bases = problems(SIZES)
    old = [basis.clone() for basis in bases]
    orders, rotations, outcomes = implementation.refresh(grams, bases)
    assert outcomes == [REFRESHED] * len(SIZES)
    for gram, before, after, order, rotation in zip(grams, old, bases, orders, rotations):
        product, eigenvalues = gram_times_basis(gram.double(), before.double())
        ordered = eigenvalues[order]
        assert torch.equal(order.sort().values, torch.arange(len(gram)))
        # (some of 100 are apart by a tenth of an eps: what rounding sorts, as column_tolerance has it)
        assert (ordered[:-1] - ordered[1:] >= -8 * EPS * len(gram) ** 0.5 * gram.norm()).all()
        expected = torch.linalg.qr(product[:, order]).Q
        tolerance = step_comparison.column_tolerance(gram, before, 0.0, EPS)
        sign = torch.where((after * expected).sum(0) < 0, -1.0, 1.0)
        error = (after.double() * sign - expected).norm(dim=0)
        assert (error <= tolerance.clamp(min=4 * EPS * len(gram) ** 0.5)).all()
        assert torch.allclose(rotation.double(), before.double().T @ after.double(), atol=4 * EPS * len(gram) ** 0.5)


# Nothing to compare with but P itself, which rounds on its own where Q is not the identity
NOT_SYMMETRIC = {"random", "collinear", "row_scaled", "column_scaled", "banded", "one_column"}


@pytest.mark.parametrize("kind", KINDS)
def test_hard_matrices(implementation, kind):
    for with_basis in (False, True):
        grams = [make(kind, d) for d in (5, 32, 40, 90, 130)]
        bases = [torch.from_numpy(orthogonal(len(gram))) if with_basis else torch.eye(len(gram)) for gram in grams]
        if with_basis and kind in NOT_SYMMETRIC:
            continue
        old = [basis.clone() for basis in bases]
        orders, rotations, outcomes = implementation.refresh([torch.from_numpy(gram) for gram in grams], bases)
        assert outcomes == [REFRESHED] * len(grams)
        for gram, before, after, order, rotation in zip(grams, old, bases, orders, rotations):
            if with_basis:
                judge_refresh(gram, before.numpy(), Result(order, after, rotation))
            else:
                assert not complaints(gram[:, order.numpy()], after.numpy())


class Result:
    def __init__(self, order, basis, rotation):
        self.order, self.basis, self.rotation = order.numpy(), basis.numpy(), rotation.numpy()


def test_due_adaptive_and_not_finite(implementation):
    sizes = (5, 32, 40, 90)
    for d in sizes:
        gram, basis = (x[0] for x in problems([d]))
        exact = torch.linalg.eigh(gram.double()).eigenvectors.flip(-1).float().contiguous()
        broken, infinite = gram.clone(), gram.clone()
        broken[0, d - 1], infinite[d // 2, 0] = torch.nan, -torch.inf
        cases = [  # gram, basis, due, expected
            (gram, basis, True, REFRESHED),
            (gram, basis, False, KEPT),
            (gram, exact, True, KEPT),
            (torch.zeros_like(gram), basis, True, KEPT),
            (broken, basis, True, FAILED),
            (infinite, basis, True, FAILED),
            (broken, basis, False, KEPT),
        ]
        bases = [case[1].clone() for case in cases]
        orders, rotations, outcomes = implementation.refresh(
            [case[0] for case in cases], bases, tolerance=0.01, due=[case[2] for case in cases]
        )
        assert outcomes == [case[3] for case in cases]
        for case, basis, order, rotation in zip(cases, bases, orders, rotations):
            changed = case[3] == REFRESHED
            assert torch.equal(basis, case[1]) != changed
            assert torch.equal(order, torch.arange(d)) != changed
            assert torch.equal(rotation, torch.eye(d)) != changed


def test_what_is_not_due_is_written_once(implementation):
    """With the outcome of the call before, as in a CUDA graph's replays: identities after a refresh, then nothing."""
    sizes = (5, 32, 40, 70)
    grams, bases = ([x.to(implementation.device) for x in xs] for xs in problems(sizes))
    orders, rotations, outcomes = results_for(bases)

    def call(due):
        due = torch.full((len(sizes),), due, device=implementation.device)
        implementation.operators.refresh_basis_(grams, bases, orders, rotations, outcomes, -1.0, due)

    call(True)
    assert outcomes.tolist() == [REFRESHED] * len(sizes)
    call(False)
    assert outcomes.tolist() == [KEPT] * len(sizes)
    for d, order, rotation in zip(sizes, orders, rotations):
        assert torch.equal(order.cpu(), torch.arange(d)) and torch.equal(rotation.cpu(), torch.eye(d))
    untouched = [i for i, d in enumerate(sizes) if implementation.name != "fibers_of_a_small_device" or d < 56]
    for i in untouched:  # (what is larger than the shared memory is written again)
        rotations[i].fill_(7.0)
    call(False)
    for i in untouched:
        assert (rotations[i] == 7.0).all()
        rotations[i].copy_(torch.eye(sizes[i]))
    call(True)
    assert outcomes.tolist() == [REFRESHED] * len(sizes)


def test_float64(implementation):
    grams, bases = ([x.double() for x in xs] for xs in problems((5, 40, 70)))
    bases = [torch.linalg.qr(basis).Q.contiguous() for basis in bases]
    old = [basis.clone() for basis in bases]
    orders, rotations, outcomes = implementation.refresh(grams, bases)
    assert outcomes == [REFRESHED] * 3
    for gram, before, after, order, rotation in zip(grams, old, bases, orders, rotations):
        expected = refresh_basis(before, *gram_times_basis(gram, before))
        assert torch.equal(order, expected.order)
        sign = torch.where((after * expected.basis).sum(0) < 0, -1.0, 1.0)
        assert torch.allclose(after * sign, expected.basis, atol=1e-9)
        assert torch.allclose(rotation, before.T @ after, atol=1e-13)


def test_bad_arguments(implementation):
    gram, basis = torch.eye(3), torch.eye(3)
    with pytest.raises(RuntimeError, match="2 grams, but 1 bases"):
        implementation.refresh([gram, gram], [basis])
    with pytest.raises(RuntimeError, match=r"gram 0 is \[3, 4\]"):
        implementation.refresh([torch.ones(3, 4)], [basis])
    with pytest.raises(RuntimeError, match=r"due must be \[1\] bool"):
        implementation.refresh([gram], [basis], due=[1])
    tensors = [x.to(implementation.device) for x in (gram, basis)]
    for outcomes in (torch.zeros(2, dtype=torch.int32), torch.zeros(1)):
        orders, rotations, _ = results_for(tensors[1:])
        with pytest.raises(RuntimeError, match=r"outcomes must be \[1\] int32"):
            implementation.operators.refresh_basis_(
                tensors[:1], tensors[1:], orders, rotations, outcomes.to(implementation.device)
            )


def test_autocast_has_no_say(implementation):
    grams, bases = problems((5, 40, 90, 130))
    expected = [basis.clone() for basis in bases]
    implementation.refresh(grams, expected)
    with torch.autocast(implementation.device, torch.bfloat16):
        implementation.refresh(grams, bases)
    assert all(torch.equal(a, b) for a, b in zip(bases, expected))


@pytest.mark.parametrize(
    ("sizes", "launches"),
    [
        ((1, 5, 32), 1),  # up to 32: one launch
        ((33, 40, 64), 3),  # larger: their products before and behind, and a launch for each class of sizes
        ((1, 5, 32, 33, 64, 65, 128, 129, 140), 1 + 5),
        ((3,) * 40, 3),  # again for each table of matrices: here it holds 16 (or 4, where that is enough), on a GPU 740 (or 32)
        ((40,) * 16 + (33,) * 2, 2 * 3),
    ],
)
def test_launches(fibers, sizes, launches):
    fibers.configure(1, SHARED_LIMITS["sm_90"])
    grams, bases = problems(sizes)
    fibers.refresh_basis_(grams, bases, *results_for(bases))
    assert fibers.launches() == launches


@pytest.mark.parametrize("name", ("gram", "hilbert", "identity", "zero", "clustered"))
def test_init_basis(implementation, name):
    grams = [torch.from_numpy(make(name, d)) for d in (1, 5, 5, 33, 5, 70)]
    for gram, basis, expected in zip(grams, implementation.init(grams), init_bases(grams)):
        assert basis.is_contiguous()
        step_comparison.assert_eigenbasis(gram.double(), basis.double(), EPS, name)
        step_comparison.assert_eigenbasis(gram.double(), expected.double(), EPS, name)


def test_init_basis_says_what_does_not_converge(implementation):
    bases = implementation.init([torch.eye(4), torch.full((4, 4), torch.nan), 2 * torch.eye(4)])
    assert [tuple(basis.shape) for basis in bases] == [(4, 4), (0, 0), (4, 4)]
    for basis in (bases[0], bases[2]):
        assert torch.equal(basis.abs().sum(0), torch.ones(4))


def test_repeated_refreshes_converge(implementation):
    """Orthogonal iteration on fixed Grams, all in one call: eigh's basis up to sign where the Gram determines it."""
    sizes = (5, 20, 40, 60)
    exact = [np.linalg.qr(np.random.default_rng(d).standard_normal((d, d)))[0] for d in sizes]
    grams = [torch.from_numpy((q * 0.5 ** np.arange(len(q)) @ q.T).astype(np.float32)) for q in exact]
    bases = [torch.from_numpy(orthogonal(d)) for d in sizes]
    for _ in range(40):
        implementation.refresh(grams, bases)
    for gram, basis, q in zip(grams, bases, exact):
        # G Q is added up with a loss of eps sqrt(d) ||G|| at most (comparison.py), its QR with another
        assert angle(gram.numpy(), basis.numpy()) < 2 * EPS * len(gram) ** 0.5
        overlap = (basis.numpy() * q).sum(0)[:8]
        assert (abs(overlap) > 1 - 1e-4).all()


def test_follows_a_drifting_gram(implementation):
    """As in test_refresh_basis_kernels: the lag is 3.3 turns, against 60 of a basis that stays."""
    d, rng = 40, np.random.default_rng(0)
    q, turn = np.linalg.qr(rng.standard_normal((d, d)))[0], 0.0005 * rng.standard_normal((d, d))
    turn = np.linalg.qr(np.eye(d) + turn - turn.T)[0]
    turn = turn * np.sign(np.diag(turn))
    still, basis = q.astype(np.float32), torch.from_numpy(q.astype(np.float32))
    for _ in range(60):
        q = turn @ q
        gram = (q * 0.7 ** np.arange(d) @ q.T).astype(np.float32)
        implementation.refresh([torch.from_numpy(gram)], [basis])
    assert angle(gram, basis.numpy()) < 0.1 * angle(gram, still)


@pytest.mark.skipif(_ext._load_error is not None, reason=str(_ext._load_error))
def test_opcheck(device):
    if device == "cuda" and _ext._cuda_load_error is not None:
        pytest.skip(_ext._cuda_load_error)
    grams, bases = ([x.to(device) for x in xs] for xs in problems((3, 33)))
    due = torch.tensor([True, False], device=device)
    for options in ((), (0.01,), (-1.0, due)):
        # zeros: what is compared must be equal before it is written too
        orders, _, outcomes = results_for(bases)
        results = [torch.zeros_like(x) for x in orders], [torch.zeros_like(basis) for basis in bases], outcomes
        torch.library.opcheck(torch.ops.soap_opt.refresh_basis_.default, (grams, bases, *results, *options))
    torch.library.opcheck(torch.ops.soap_opt.init_basis.default, (grams,))
