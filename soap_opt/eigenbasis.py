"""The eigenbasis: init, project, refresh and re-express, as pure functions of tensors.

The mode product, in the whole package: ``(X x_i M)[.., j, ..] = sum_a X[.., a, ..] M[a, j]``.
Every function takes tensors with or without one leading batch dimension N ("[*, ...]" below).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Layout

# Grams up to this size are decomposed as one batch. For larger Grams LAPACK in a loop is no slower
# (14 matrices of 128: 3.6 ms in a loop, 4.7 ms as one batch, 2 cores), and stacking would copy them.
BATCH_MAX_DIM = 64

# Blocks of a Gram narrower than this lose more in gemm efficiency than the triangle saves
TRIANGLE_MIN_BLOCK = 64

# A BLAS may add the rows of a narrow product one after the other: MKL's sgemm leaves 2e-4 of a 7 x 7 Gram over 307,200 rows
# in rounding. So products narrower than this are added in pieces of NARROW_ROWS rows.
NARROW = 32
NARROW_ROWS = 512


@contextmanager
def full_precision_matmul(device_types: set[str]) -> Iterator[None]:
    """No autocast and no TF32/bfloat16 inside matrix products: reduced precision there is known to ruin the basis."""
    # These settings belong to one backend each. torch.set_float32_matmul_precision raises once somebody has set a backend, and
    # restoring it would overwrite that setting. "none" inherits; where nothing is set it means full precision.
    products = [
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]  # torch puts an object in the module's place
    ]
    with ExitStack() as stack:
        for device_type in device_types:
            if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        for product in products:
            precision = product.fp32_precision
            if precision not in ("ieee", "none"):
                product.fp32_precision = "ieee"
                stack.callback(setattr, product, "fp32_precision", precision)
        yield


@contextmanager
def same_for_all_threads() -> Iterator[None]:
    """Run on one thread where ``torch.use_deterministic_algorithms(True)`` asks for reproducible results: BLAS and LAPACK split
    a sum into as many parts as there are threads, and ranks with different numbers of threads would get different bases."""
    threads = torch.get_num_threads()
    if threads == 1 or not torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def kronecker(matrices: Sequence[Tensor]) -> Tensor:
    """``torch.kron`` of matrices [*, d_i, d_i], left to right -> [*, prod d_i, prod d_i]."""
    product = matrices[0]
    for matrix in matrices[1:]:
        width = product.shape[-1] * matrix.shape[-1]
        product = (product[..., :, None, :, None] * matrix[..., None, :, None, :]).reshape(*matrix.shape[:-2], width, width)
    return product


def _project(x: Tensor, bases: Sequence[Tensor], layout: Layout, *, back: bool) -> Tensor:
    if not layout.modes:
        return x
    batch = x.shape[: x.dim() - len(layout.shape)]
    by_mode = dict(zip(layout.modes, bases))
    y = layout.arrange(x)  # [*, D_1, ..., D_k]
    for group in layout.mode_groups:
        # [*, D, rest]^T @ [*, D, D] -> [*, rest, D]: the first dimension becomes the last. So every product is one gemm on a
        # matrix that needs no copy, and after k products the dimensions are in their old order.
        y = y.reshape(*batch, group.width, -1).mT
        if group.modes:
            matrix = kronecker([by_mode[i] for i in group.modes])
            y = y @ (matrix.mT if back else matrix)
    return layout.restore(y, len(batch))


def project(x: Tensor, bases: Sequence[Tensor], layout: Layout) -> Tensor:
    """``X x_1 Q_1 ... x_k Q_k``: into the eigenbasis.

    Args:
        x: [*, *layout.shape].
        bases: one [*, d_i, d_i] for each of layout.modes.

    Returns:
        A tensor of x's shape; x itself when there is no preconditioned mode.
    """
    return _project(x, bases, layout, back=False)


def project_back(x: Tensor, bases: Sequence[Tensor], layout: Layout) -> Tensor:
    """``X x_1 Q_1^T ... x_k Q_k^T``: out of the eigenbasis; arguments as in :func:`project`."""
    return _project(x, bases, layout, back=True)


def outer_products(x: Tensor, layout: Layout) -> list[Tensor]:
    """x contracted with itself over all modes but i, [*, d_i, d_i], for each of layout.modes."""
    batch = x.dim() - len(layout.shape)
    y = layout.arrange(x)  # [*, D_1, ..., D_k]
    by_mode: dict[int, Tensor] = {}
    for position, group in enumerate(layout.mode_groups):
        if not group.modes:
            continue
        columns = y.movedim(batch + position, -1).reshape(*y.shape[:batch], -1, group.width)  # [*, rest, D]
        outer = _self_product(columns)  # [*, D, D]
        for place, mode in enumerate(group.modes):
            by_mode[mode] = _partial_trace(outer, group.sizes, place)
    return [by_mode[mode] for mode in layout.modes]


def _self_product(x: Tensor) -> Tensor:
    """x^T x, [*, rest, d] -> [*, d, d]. ATen has no syrk: a large product is a triangle of gemm blocks, mirrored.

    At d = 128 and 192 the triangle takes 0.80 of the full product's time (3,200 rows, one core).
    """
    width = x.shape[-1]
    if x.dim() == 2 and width < NARROW and x.shape[0] >= 4 * NARROW_ROWS:
        whole = x.shape[0] // NARROW_ROWS * NARROW_ROWS
        pieces = x[:whole].reshape(-1, NARROW_ROWS, width)
        return (pieces.mT @ pieces).sum(0) + x[whole:].mT @ x[whole:]
    if x.dim() > 2 or width < 2 * TRIANGLE_MIN_BLOCK:
        return x.mT @ x
    half = width // 2
    left, right = x[:, :half], x[:, half:]
    product = x.new_empty(width, width)
    product[:half, :half] = _self_product(left)
    product[half:, half:] = _self_product(right)
    torch.mm(right.mT, left, out=product[half:, :half])
    product[:half, half:] = product[half:, :half].mT
    return product


def _partial_trace(outer: Tensor, sizes: tuple[int, ...], keep: int) -> Tensor:
    """[*, D, D] with D = prod(sizes) -> [*, d, d], d = sizes[keep], the other factors traced out."""
    if len(sizes) == 1:
        return outer
    batch = outer.shape[:-2]
    outer = outer.reshape(*batch, *sizes, *sizes)
    for place in reversed(range(len(sizes))):
        if place != keep:
            factors = (outer.dim() - len(batch)) // 2
            first = len(batch) + place
            outer = outer.diagonal(dim1=first, dim2=first + factors).sum(-1)
    return outer


class Refresh(NamedTuple):
    """One power iteration towards the eigenvectors of a Gram."""

    order: Tensor  # [*, d] the permutation that sorts the estimated eigenvalues, largest first
    basis: Tensor  # [*, d, d] the new Q'
    rotation: Tensor  # [*, d, d] Q^T Q' with the *unpermuted* Q: turns coordinates in Q into coordinates in Q'


def gram_times_basis(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """P = 2^k G Q [*, d, d] and e = diag(Q^T P) [*, d]. One product serves the eigenvalues, the criterion and the QR.

    2^k brings G's largest entry near 1. The scale changes neither Q' nor the order of the eigenvalues nor the off-diagonal
    share, and keeps products and squares of very small and very large Grams inside the range of their type.
    """
    largest = gram.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(gram.dtype).tiny)
    scale = torch.frexp(largest).mantissa / largest  # a power of two, exactly (torch.ldexp's need not be)
    product = (gram * scale) @ basis
    return product, (basis * product).sum(-2)


def off_diagonal_share(basis: Tensor, product: Tensor, eigenvalues: Tensor) -> Tensor:
    """off(B) / ||B||_F of B = Q^T G Q, [*]; 0 for G = 0.

    Q is orthogonal, so that off(B) = ||P - Q diag(e)||_F and ||B||_F = ||P||_F: O(d^2) instead of another product.
    """
    norm = torch.linalg.matrix_norm(product)
    off = torch.linalg.matrix_norm(product - basis * eigenvalues.unsqueeze(-2))
    return torch.where(norm == 0, torch.zeros_like(norm), off / norm)  # NaN where P is not finite


def refresh_basis(basis: Tensor, product: Tensor, eigenvalues: Tensor) -> Refresh:
    """Q' = qr(P sorted).Q, from P and e of :func:`gram_times_basis`. Arguments [*, d, d], [*, d, d], [*, d]."""
    order = eigenvalues.argsort(dim=-1, descending=True, stable=True)
    columns = order.unsqueeze(-2).expand_as(product)
    new_basis = torch.linalg.qr(product.gather(-1, columns)).Q.contiguous()  # LAPACK's result is column-major
    rotation = basis.mT @ new_basis
    flush_subnormals_((new_basis, rotation))  # an entry that mixes a decaying block of G with another block decays too
    return Refresh(order, new_basis, rotation)


def is_orthogonal(basis: Tensor) -> Tensor:
    """Whether Q [*, d, d] is finite and orthogonal, [*] bool, in O(d^2).

    Two errors may be up to 512 eps sqrt(d): every entry of (Q^T Q - I) x, for one vector x of numbers between 1 and 2 and
    their negatives, and every column's squared norm less 1. In LAPACK's own Q the errors reach 110 eps sqrt(d) for Grams whose
    rows are multiples of each other (float64, d = 1000), and a few eps sqrt(d) for other Grams.
    """
    d = basis.shape[-1]
    place = torch.arange(d, dtype=torch.float64, device="cpu")
    # no two entries have the same magnitude, so that errors of an ordinary kind do not cancel
    probe = torch.where(place % 2 == 0, 1.0, -1.0) * (1 + (place * 0.6180339887498949).frac())
    x = probe.to(basis).unsqueeze(-1)  # [d, 1]
    bound: float = 512 * torch.finfo(basis.dtype).eps * d**0.5
    off = (basis.mT @ (basis @ x) - x).abs().amax((-2, -1))
    return (off <= bound) & ((basis.square().sum(-2) - 1).abs().amax(-1) <= bound)  # NaN fails both


def flush_subnormals_(tensors: Iterable[Tensor]) -> None:
    """Set every number below the smallest normal one (1.2e-38; float64: 2.2e-308) to 0, in place.

    A Gram's block, or a moment, whose gradients stay 0 decays by a constant factor a step. After some 1,700 steps it reaches
    the subnormal numbers, where rounding to nearest holds it for ever, and where a CPU takes ten times as long for every
    product that meets it. Nothing is lost: the square root of such a v is 1e-19, far below any useful eps.
    """
    for tensor in tensors:
        tensor.masked_fill_(tensor.abs() < torch.finfo(tensor.dtype).tiny, 0)


def reexpress_(
    exp_avg: Tensor, exp_avg_sq: Tensor, bases: Sequence[Tensor], layout: Layout, refreshed: Mapping[int, Refresh]
) -> None:
    """Move one parameter's state to refreshed bases, in place.

    Mode i of v is permuted (its entries belong to eigenvectors), mode i of m is turned by Q^T Q', and Q becomes Q'.

    Args:
        exp_avg, exp_avg_sq: [*layout.shape].
        bases: one [d_i, d_i] for each of layout.modes.
        refreshed: for each refreshed *position* in layout.modes its (unbatched) Refresh.
    """
    by_mode = {layout.modes[position]: result for position, result in refreshed.items()}

    squared = layout.merged(exp_avg_sq)
    for mode, result in by_mode.items():
        squared = squared.index_select(mode, result.order)
    exp_avg_sq.copy_(layout.unmerged(squared))

    moment = layout.arrange(exp_avg)  # [D_1, ..., D_k]
    widths = moment.shape
    for position, group in enumerate(layout.mode_groups):
        if by_mode.keys().isdisjoint(group.modes):
            continue
        factors = [
            by_mode[mode].rotation if mode in by_mode else torch.eye(size, dtype=exp_avg.dtype, device=exp_avg.device)
            for mode, size in zip(group.modes, group.sizes)
        ]
        moment = _multiply(moment.reshape(widths), kronecker(factors), position)
    exp_avg.copy_(layout.restore(moment))

    for position, result in refreshed.items():
        bases[position].copy_(result.basis)


def _multiply(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """x x_dim M for x [..., D, ...] contiguous and M [D, D]; the result keeps the order of dimensions, not the shape."""
    width = matrix.shape[0]
    before, after = x.shape[:dim].numel(), x.shape[dim + 1 :].numel()
    if after == 1:
        return x.reshape(before, width) @ matrix
    if before == 1:
        return matrix.mT @ x.reshape(width, after)
    return matrix.mT @ x.reshape(before, width, after)


class EigenDecompositionError(RuntimeError):
    """eigh failed on the Gram at ``index``, in its own precision and in float64."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


def init_bases(grams: Sequence[Tensor], fused: bool = False) -> list[Tensor]:
    """Q = flip(eigh(G + 1e-30 I)) of every G [d, d]: orthogonal, largest eigenvalue first, contiguous.

    Args:
        grams: matrices of any sizes.
        fused: use the compiled operator, which spreads the matrices over the cores, or batches them on CUDA. All matrices are
            then on one device.

    Raises:
        EigenDecompositionError: eigh did not converge on a matrix, nor in float64.
    """
    if fused and grams:
        made: list[Tensor] = torch.ops.soap_opt.init_basis(list(grams))
        for i, (gram, basis) in enumerate(zip(grams, made)):
            if basis.shape != gram.shape:
                raise EigenDecompositionError(i, "linalg.eigh: The algorithm failed to converge")
        return made
    with same_for_all_threads():
        return _init_bases(grams)


def _init_bases(grams: Sequence[Tensor]) -> list[Tensor]:
    bases: dict[int, Tensor] = {}
    by_kind: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    for i, gram in enumerate(grams):
        by_kind.setdefault((gram.device, gram.dtype, gram.shape[0]), []).append(i)
    for (_, _, size), indices in by_kind.items():
        chunks = [indices] if size <= BATCH_MAX_DIM else [[i] for i in indices]
        for chunk in chunks:
            try:
                basis = _eigenvectors(torch.stack([grams[i] for i in chunk]))
            except torch.linalg.LinAlgError:
                basis = torch.stack([_eigenvectors_in_float64(grams[i], i) for i in chunk])
            for i, q in zip(chunk, basis.unbind(0)):
                # clone: a view of one member would keep (and save) the whole stack
                bases[i] = q.clone(memory_format=torch.contiguous_format) if len(chunk) > 1 else q.contiguous()
    return [bases[i] for i in range(len(grams))]


def _eigenvectors(gram: Tensor) -> Tensor:
    damping = 1e-30 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    vectors: Tensor = torch.linalg.eigh(gram + damping).eigenvectors
    if not is_orthogonal(vectors).all():
        raise torch.linalg.LinAlgError("linalg.eigh: the result is not finite, or not orthogonal")
    return vectors.flip(-1)


def _eigenvectors_in_float64(gram: Tensor, index: int) -> Tensor:
    """eigh fails on near-degenerate float32 matrices; in float64 their clusters of eigenvalues are apart."""
    try:
        return _eigenvectors(gram)
    except torch.linalg.LinAlgError:
        try:
            return _eigenvectors(gram.double()).to(gram.dtype)
        except torch.linalg.LinAlgError as error:
            raise EigenDecompositionError(index, str(error)) from error
