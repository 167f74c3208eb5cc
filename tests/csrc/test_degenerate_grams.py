"""Refreshes from the Grams of degenerate gradients: dead units, rows out of use, equal rows, gradients of any size.

Whatever the Gram, Q' is finite, orthogonal and the Q of P's QR decomposition: in PyTorch, in the C++ engine, and in the CUDA
kernels on fibers. Grams like these are what ordinary networks make: the sum of a layer's outputs as a loss gives rows that are
all equal, an embedding whose rows are no longer looked up a block that decays by 0.95 a step.
"""

import math

import pytest
import torch
from comparison import needs_engine
from harness import REFRESHED, SHARED_LIMITS

from soap_opt import eigenbasis

SIZES = (*range(1, 41), 63, 64, 65, 100, 130)
LARGE = (300, 520)
SMALL_DEVICE = 18432  # bytes of shared memory: what does not fit goes through the panels


def generator(*seed):
    return torch.Generator().manual_seed(hash(seed) % 2**31)


def gram_of_rank(d, rank):
    x = torch.randn(d, rank, dtype=torch.float64, generator=generator(d, rank))
    return x @ x.mT


def kinds(d, dtype, every):
    """(name, Gram [d, d] float64) of one size. every: step of the exponents."""
    ones = torch.ones(d, d, dtype=torch.float64)
    for rank in range(3):
        yield f"rank {rank}", gram_of_rank(d, rank)
    yield "equal rows", 20 * ones
    yield "equal columns", 3 * torch.outer(*[torch.arange(1.0, d + 1, dtype=torch.float64)] * 2)
    full = gram_of_rank(d, d + 2)
    dead = torch.arange(d) % 3 == 1
    zeros = full.clone()
    zeros[dead] = 0
    zeros[:, dead] = 0
    yield "zero rows and columns", zeros
    corner = torch.zeros_like(full)
    corner[d - 1, d - 1] = 1
    yield "one entry", corner
    off = torch.zeros_like(full)
    off[0, d - 1] = off[d - 1, 0] = 1
    yield "one entry off the diagonal", off
    integers = torch.randint(-3, 4, (d, max(1, d // 2)), generator=generator(d)).double()
    yield "integers", integers @ integers.mT
    limits = torch.finfo(dtype)
    least = math.log2(limits.smallest_normal) - math.log2(1 / limits.eps)  # of the smallest subnormal number
    half = (d + 1) // 2
    for k in range(0, int(-least) + 12, every):
        for part, size in (("half", half), ("one row", 1)):
            blocks = full.clone()
            blocks[size:] = blocks[:, size:] = 0
            blocks[size:, size:] = gram_of_rank(d - size, d) * 2.0**-k
            yield f"{part} on, the rest 2^-{k} of it", blocks
    decades = int(math.log10(limits.max))
    for decade in range(-decades, decades + 1, max(1, every // 3)):
        yield f"1e{decade}", full / full.norm() * 10.0**decade
        yield f"1e{decade}, rank 1", ones / d * 10.0**decade


def orthogonal(d, dtype):
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator(d))).Q.to(dtype).contiguous()


def judge(name, gram, basis, order, new, rotation):
    """In float64, from P = G Q of the stored G and Q, and everything in units of eps sqrt(d). Orthogonality: three times what
    LAPACK has on the same matrix, and 6 for the luck of either (4 for ordinary matrices, matrices.allowed; in panels the CUDA
    kernels reflect on rounding where columns are multiples of each other, and are at 7.3 for d = 130)."""
    d, unit = len(gram), torch.finfo(gram.dtype).eps * len(gram) ** 0.5
    assert new.isfinite().all() and rotation.isfinite().all(), name
    assert order.sort().values.equal(torch.arange(d)), name
    old, q = basis.double(), new.double()

    def defect(q):
        return float((q.mT @ q - torch.eye(d, dtype=torch.float64)).norm())

    product, _ = eigenbasis.gram_times_basis(gram, basis)
    lapack = torch.linalg.qr(product[:, order]).Q.double()
    assert defect(q) <= 3 * max(defect(lapack), unit) + 6 * unit, (name, defect(q) / unit, defect(lapack) / unit)
    assert (rotation.double() - old.mT @ q).norm() <= 8 * unit * d**0.5, name
    product = gram.double() / (gram.abs().max().double() or 1.0) @ old
    r = q.mT @ product[:, order]
    # Rounding of P, d products to an entry, and of Householder's own
    assert r.tril(-1).norm() <= 8 * unit * d**0.5 * max(float(product.norm()), 1e-300), name


def problems(sizes, dtype, every):
    """Names, Grams and bases: the identity, which keeps the blocks of a Gram apart, and one that mixes them."""
    rows = [
        (f"{name}, d = {d}, {basis}", gram.to(dtype), torch.eye(d, dtype=dtype) if basis == "I" else orthogonal(d, dtype))
        for d in sizes
        for name, gram in kinds(d, dtype, every)
        for basis in ("I", "Q")
    ]
    return [list(column) for column in zip(*rows)]


def check_operator(operator, sizes, dtype, every):
    names, grams, bases = problems(sizes, dtype, every)
    old = [basis.clone() for basis in bases]
    orders = [torch.full((len(gram),), -1, dtype=torch.int64) for gram in grams]
    rotations = [torch.full_like(gram, torch.nan) for gram in grams]
    outcomes = torch.full((len(grams),), -1, dtype=torch.int32)
    operator(grams, bases, orders, rotations, outcomes)
    assert not [name for name, outcome in zip(names, outcomes.tolist()) if outcome != REFRESHED]
    for row in zip(names, grams, old, orders, bases, rotations):
        judge(*row)


BOTH = pytest.mark.parametrize("dtype", (torch.float32, torch.float64))


@needs_engine
@BOTH
def test_the_engine(dtype):
    check_operator(torch.ops.soap_opt.refresh_basis_, SIZES[::3], dtype, 7 if dtype == torch.float32 else 50)


@needs_engine
@pytest.mark.slow
@BOTH
def test_the_engine_with_every_size_and_exponent(dtype):
    check_operator(torch.ops.soap_opt.refresh_basis_, SIZES, dtype, 1 if dtype == torch.float32 else 16)
    check_operator(torch.ops.soap_opt.refresh_basis_, LARGE, dtype, 30 if dtype == torch.float32 else 200)


@BOTH
def test_the_specification(dtype):
    for name, gram, basis in zip(*problems(SIZES[::3], dtype, 10 if dtype == torch.float32 else 80)):
        new = eigenbasis.refresh_basis(basis, *eigenbasis.gram_times_basis(gram, basis))
        judge(name, gram, basis, *new)
        assert eigenbasis.is_orthogonal(new.basis), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "limit",
    [
        pytest.param(SHARED_LIMITS["sm_90"], id="sm_90"),
        pytest.param(SMALL_DEVICE, id="small device", marks=pytest.mark.slow),
    ],
)
def test_the_cuda_kernels(fibers, limit):
    fibers.configure(1, limit)
    check_operator(fibers.refresh_basis_, (1, 2, 7, 16, 31, 32, 33, 60), torch.float32, 25)


@pytest.mark.slow
@pytest.mark.parametrize("limit", (SHARED_LIMITS["sm_90"], SMALL_DEVICE), ids=("sm_90", "small device"))
def test_the_cuda_kernels_with_every_size(fibers, limit):
    fibers.configure(2, limit)
    check_operator(fibers.refresh_basis_, SIZES, torch.float32, 12)
    check_operator(fibers.refresh_basis_, (1, 2, 3, 5), torch.float64, 100)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_what_is_orthogonal_enough(dtype):
    """One pair of columns that is not at right angles, one column that is too long, one NaN: each is seen, at any place."""
    bound = 512 * torch.finfo(dtype).eps
    for d in (2, 3, 32, 33, 200):
        q = orthogonal(d, dtype)
        assert eigenbasis.is_orthogonal(q)
        for i, j in ((0, d - 1), (d // 2, 0), (d - 1, d // 2)):
            if i == j:
                continue
            for size, good in ((0.1, True), (4.0, False)):
                leaning, long = q.clone(), q.clone()
                leaning[:, i] += size * bound * d**0.5 * q[:, j]
                long[:, i] *= 1 + size * bound * d**0.5
                assert bool(eigenbasis.is_orthogonal(leaning)) is good
                assert bool(eigenbasis.is_orthogonal(long)) is good
        for value in (torch.nan, torch.inf):
            broken = q.clone()
            broken[d - 1, 0] = value
            assert not eigenbasis.is_orthogonal(broken)
        assert not eigenbasis.is_orthogonal(torch.zeros(d, d, dtype=dtype))
        stack = torch.stack([q, torch.zeros_like(q), q])
        assert eigenbasis.is_orthogonal(stack).tolist() == [True, False, True]
