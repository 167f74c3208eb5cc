"""Pure functions of tensors: each against its defining formula, in float64 where rounding would only blur it."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import contraction, mode_product
from step_comparison import gram_tolerance

from soap_opt import eigenbasis
from soap_opt.eigenbasis import (
    EigenDecompositionError,
    full_precision_matmul,
    gram_times_basis,
    init_bases,
    kronecker,
    off_diagonal_share,
    outer_products,
    project,
    project_back,
    reexpress_,
    refresh_basis,
)
from soap_opt.layout import layout_of

EPS = torch.finfo(torch.float64).eps


def layout_for(shape, order=None, **options):
    options = {
        "max_precond_dim": 10000,
        "merge_dims": False,
        "precondition_1d": True,
        "data_format": "channels_first",
        **options,
    }
    return layout_of(tuple(shape), tuple(order or range(len(shape))), **options)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(size, seed=0):
    return torch.linalg.qr(random(size, size, seed=seed)).Q


def symmetric(size, seed=0):
    x = random(size, size + 2, seed=seed)
    return x @ x.T


# Every way in which modes are grouped: alone, as Kronecker products of two and of three, not preconditioned, ones between.
CASES = [
    layout_for((7,)),
    layout_for((6, 5)),
    layout_for((6, 4, 3, 3)),
    layout_for((6, 4, 3, 3), order=(0, 2, 3, 1)),
    layout_for((8, 7, 2, 2, 2)),
    layout_for((1, 5, 1, 4)),
    layout_for((9, 5, 12, 4), max_precond_dim=8),
    layout_for((9, 5), max_precond_dim=0),
    layout_for((3, 2, 2, 4), merge_dims=True, max_precond_dim=6, data_format="channels_last"),
    layout_for((2, 3, 4, 5), order=(3, 1, 0, 2), merge_dims=True, max_precond_dim=6),
    layout_for((40, 25, 3, 3)),
]


@st.composite
def layouts(draw):
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=5)))
    order = draw(st.permutations(range(len(shape))))
    return layout_for(
        shape,
        order,
        max_precond_dim=draw(st.sampled_from([0, 2, 4, 6, 12, 40])),
        merge_dims=draw(st.booleans()),
        data_format=draw(st.sampled_from(["channels_first", "channels_last"])),
    )


def check_products(layout, batch=()):
    x = random(*batch, *layout.shape)
    bases = [random(*batch, d, d, seed=i + 1) for i, d in enumerate(layout.sizes)]  # need not be orthogonal for a product
    forward, back, outers = project(x, bases, layout), project_back(x, bases, layout), outer_products(x, layout)
    assert forward.shape == back.shape == x.shape and len(outers) == len(layout.modes)
    for n in range(batch[0]) if batch else [None]:
        pick = (lambda t: t) if n is None else (lambda t: t[n])  # noqa: B023
        merged, expected, expected_back = (layout.merged(pick(x)) for _ in range(3))
        for i, basis in zip(layout.modes, bases):
            expected = mode_product(expected, pick(basis), i)
            expected_back = mode_product(expected_back, pick(basis).T, i)
        scale = float(expected.abs().max()) + float(expected_back.abs().max())
        for got, want in ((forward, expected), (back, expected_back)):
            torch.testing.assert_close(layout.merged(pick(got)), want, rtol=0, atol=100 * EPS * scale)
        for got, i in zip(outers, layout.modes):
            torch.testing.assert_close(pick(got), contraction(merged, i), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
@pytest.mark.parametrize("layout", CASES, ids=lambda layout: str(layout.shape))
def test_products(layout, batch):
    check_products(layout, batch)


@settings(max_examples=60)
@given(layout=layouts(), batch=st.sampled_from([(), (2,)]))
def test_products_of_anything(layout, batch):
    check_products(layout, batch)


def test_project_back_undoes_project():
    for layout in CASES:
        x = random(*layout.shape)
        bases = [orthogonal(d, seed=i) for i, d in enumerate(layout.sizes)]
        torch.testing.assert_close(project_back(project(x, bases, layout), bases, layout), x, rtol=1e-12, atol=1e-12)


def test_products_of_empty_and_scalar_tensors():
    for shape in ((), (0,), (0, 3), (3, 0, 2)):
        layout = layout_for(shape)
        x = torch.ones(shape)
        assert torch.equal(project(x, [], layout), x) and torch.equal(project_back(x, [], layout), x)
        assert outer_products(x, layout) == []


@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("width", [95, 96, 97, 193])
def test_large_grams_are_symmetric_and_right(width, rows):
    """Sizes about the one from which the Gram is made of a triangle of blocks."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    gram = outer_products(x, layout_for((rows, width)))[-1]
    tolerance = gram_tolerance(rows, torch.finfo(torch.float32).eps)  # (an entry and its mirror image may be two sums)
    assert (gram - gram.T).norm() <= tolerance * gram.norm()
    exact = x.double().T @ x.double()
    assert (gram - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("sizes", [(3,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize("batch", [(), (4,)])
def test_kronecker(sizes, batch):
    matrices = [random(*batch, d, d, seed=d) for d in sizes]
    product = kronecker(matrices)
    for n in range(math.prod(batch)):
        expected = matrices[0].reshape(-1, sizes[0], sizes[0])[n]
        for matrix in matrices[1:]:
            expected = torch.kron(expected.contiguous(), matrix.reshape(-1, *matrix.shape[-2:])[n])
        torch.testing.assert_close(product.reshape(-1, *product.shape[-2:])[n], expected)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_gram_times_basis_and_off_diagonal_share(batch):
    gram = torch.stack([symmetric(6, seed=i) for i in range(3)]) if batch else symmetric(6)
    basis = torch.stack([orthogonal(6, seed=i + 5) for i in range(3)]) if batch else orthogonal(6, seed=5)
    product, eigenvalues = gram_times_basis(gram, basis)
    rotated = basis.mT @ gram @ basis
    scale = 2.0 ** -torch.floor(torch.log2(gram.abs().amax((-2, -1), keepdim=True)) + 1)  # [*, 1, 1]: largest in [1/2, 1)
    torch.testing.assert_close(product, scale * (gram @ basis))
    torch.testing.assert_close(eigenvalues, scale.squeeze(-1) * rotated.diagonal(dim1=-2, dim2=-1))
    off = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    expected = torch.linalg.matrix_norm(off) / torch.linalg.matrix_norm(rotated)
    torch.testing.assert_close(off_diagonal_share(basis, product, eigenvalues), expected)


def test_off_diagonal_share_of_nothing_and_of_an_exact_basis():
    zero = torch.zeros(4, 4)
    assert off_diagonal_share(torch.eye(4), *gram_times_basis(zero, torch.eye(4))) == 0  # not nan
    gram = symmetric(5)
    basis = torch.linalg.eigh(gram).eigenvectors
    assert off_diagonal_share(basis, *gram_times_basis(gram, basis)) < 100 * EPS


@pytest.mark.parametrize("batch", [(), (3,)])
def test_refresh_basis(batch):
    """Q' = qr(G Q, columns by falling e).Q: order, orthogonality, span of the leading columns, the rotation."""
    gram = torch.stack([symmetric(6, seed=i) for i in range(3)]) if batch else symmetric(6)
    basis = torch.stack([orthogonal(6, seed=i + 5) for i in range(3)]) if batch else orthogonal(6, seed=5)
    product, eigenvalues = gram_times_basis(gram, basis)
    result = refresh_basis(basis, product, eigenvalues)
    assert result.basis.is_contiguous()  # LAPACK's is column-major
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(result.basis.mT @ result.basis, identity.expand_as(gram), rtol=0, atol=50 * EPS)
    torch.testing.assert_close(result.rotation, basis.mT @ result.basis)
    for n in range(3 if batch else 1):
        pick = (lambda t: t[n]) if batch else (lambda t: t)  # noqa: B023
        order = pick(result.order)
        ordered = pick(eigenvalues)[order]
        assert (ordered[:-1] >= ordered[1:]).all() and sorted(order.tolist()) == list(range(6))
        triangle = pick(result.basis).T @ pick(product)[:, order]
        assert triangle.tril(-1).abs().max() < 1e-10  # R of a QR is upper triangular


def test_refresh_converges_to_the_eigenvectors():
    """Orthogonal iteration: repeated on one Gram it makes Q^T G Q diagonal, sorted, and then keeps still."""
    vectors = orthogonal(6, seed=1)
    gram = vectors @ torch.diag(torch.tensor([32.0, 16, 8, 4, 2, 1], dtype=torch.float64)) @ vectors.T
    basis = orthogonal(6, seed=2)
    for _ in range(60):
        basis = refresh_basis(basis, *gram_times_basis(gram, basis)).basis
    torch.testing.assert_close((basis.T @ vectors).abs(), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_equal_eigenvalues_keep_their_order():
    """A stable sort: on a multiple of the identity nothing is permuted, on any device and in every run."""
    basis = orthogonal(5)
    result = refresh_basis(torch.eye(5), 3 * torch.eye(5), torch.full((5,), 3.0))
    assert result.order.tolist() == list(range(5))
    assert torch.equal(result.basis.abs(), torch.eye(5))
    rotated = refresh_basis(basis, 3 * basis, torch.full((5,), 3.0, dtype=torch.float64))
    torch.testing.assert_close((rotated.basis.T @ basis).abs(), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", ["all", "first", "last"])
@pytest.mark.parametrize("layout", [c for c in CASES if len(c.modes) > 1], ids=lambda layout: str(layout.shape))
def test_reexpress(layout, which):
    """m stays the same tensor in parameter space, v is permuted mode by mode, Q becomes Q'; other modes stay."""
    bases = [orthogonal(d, seed=i) for i, d in enumerate(layout.sizes)]
    old = [b.clone() for b in bases]
    m, v = random(*layout.shape, seed=8), random(*layout.shape, seed=9).square()
    m_before, v_expected = project_back(m, old, layout), layout.merged(v).clone()
    positions = {"all": range(len(bases)), "first": [0], "last": [len(bases) - 1]}[which]
    refreshed = {}
    for position in positions:
        refreshed[position] = refresh_basis(
            old[position], *gram_times_basis(symmetric(layout.sizes[position], seed=position), old[position])
        )
        v_expected = v_expected.index_select(layout.modes[position], refreshed[position].order)
    reexpress_(m, v, bases, layout, refreshed)
    torch.testing.assert_close(project_back(m, bases, layout), m_before, rtol=1e-10, atol=1e-12)
    assert torch.equal(layout.merged(v), v_expected)
    for position, (new, before) in enumerate(zip(bases, old)):
        assert torch.equal(new, refreshed[position].basis if position in refreshed else before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_init_bases(dtype):
    """Sorted orthonormal eigenvectors of each Gram, whatever else is in the batch; the results own their memory."""
    grams = [symmetric(d, seed=d).to(dtype) for d in (3, 5, 3, 70, 64, 5, 1)]
    bases = init_bases(grams)
    eps = torch.finfo(dtype).eps
    for gram, basis in zip(grams, bases):
        size = gram.shape[0]
        assert basis.dtype == dtype and basis.is_contiguous()
        assert basis.untyped_storage().nbytes() == basis.numel() * basis.element_size()
        rotated = basis.double().T @ gram.double() @ basis.double()
        values = rotated.diagonal()
        assert (rotated - torch.diag(values)).norm() < 10 * size * eps * gram.norm()
        assert (values[:-1] >= values[1:] - 10 * size * eps * gram.norm()).all()
        identity = torch.eye(size, dtype=torch.float64)
        assert (basis.double().T @ basis.double() - identity).norm() < 10 * size * eps
    assert init_bases([]) == []


def test_init_bases_of_rank_one_and_of_zero():
    vector = random(6)
    one, zero = init_bases([torch.outer(vector, vector), torch.zeros(6, 6, dtype=torch.float64)])
    torch.testing.assert_close((one[:, 0] @ vector).abs(), vector.norm())
    for basis in (one, zero):
        torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64), rtol=0, atol=50 * EPS)


class Eigh:
    """torch.linalg.eigh that fails (raises, or says nan) on the matrices that ``bad`` picks."""

    def __init__(self, bad, nan=False):
        self.bad, self.nan, self.original = bad, nan, torch.linalg.eigh

    def __call__(self, matrix):
        if self.bad(matrix):
            if self.nan:
                return SimpleNamespace(eigenvectors=torch.full_like(matrix, float("nan")))
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return self.original(matrix)


@pytest.mark.parametrize("nan", [False, True], ids=["raises", "nan"])
def test_only_the_failing_matrix_of_a_batch_is_retried(monkeypatch, nan):
    grams = [symmetric(4, seed=i).float() for i in range(3)]
    plain = init_bases(grams)
    mark = grams[1][0, 0].item()
    fails = Eigh(lambda x: x.dtype == torch.float32 and bool((x[..., 0, 0] == mark).any()), nan)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    bases = init_bases(grams)
    for i, (got, want) in enumerate(zip(bases, plain)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.abs(), want.abs(), rtol=1e-3, atol=1e-4 if i == 1 else 1e-6)


def test_a_matrix_that_fails_in_float64_too_is_named_by_its_index(monkeypatch):
    grams = [symmetric(4, seed=i).float() for i in range(3)]
    mark = grams[2][0, 0].item()
    monkeypatch.setattr(torch.linalg, "eigh", Eigh(lambda x: bool((x[..., 0, 0] == mark).any())))
    with pytest.raises(EigenDecompositionError, match="failed to converge") as caught:
        init_bases(grams)
    assert caught.value.index == 2


def test_full_precision_matmul_restores_what_it_found():
    seen = []

    def now():
        return torch.is_autocast_enabled("cpu"), torch.backends.cuda.matmul.fp32_precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outside = now()
            with full_precision_matmul({"cpu"}):
                seen.append(now())
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert now() == outside == (True, "tf32")
            with pytest.raises(ZeroDivisionError), full_precision_matmul({"cpu"}):
                raise ZeroDivisionError
            assert now() == outside
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [(False, "ieee")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_tf32_on_cuda():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        x = torch.randn(256, 256, device="cuda")
        with full_precision_matmul({"cuda"}):
            product = x @ x
        exact = x.double() @ x.double()
        assert (product - exact).norm() < 1e-6 * exact.norm()
    finally:
        torch.set_float32_matmul_precision(before)


def test_batched_and_looped_decompositions_agree():
    """About the size up to which Grams are decomposed as one batch."""
    for size in (eigenbasis.BATCH_MAX_DIM, eigenbasis.BATCH_MAX_DIM + 1):
        grams = [symmetric(size, seed=i) for i in range(2)]
        for basis, gram in zip(init_bases(grams), grams):
            torch.testing.assert_close(basis, init_bases([gram])[0], rtol=1e-9, atol=1e-9)
