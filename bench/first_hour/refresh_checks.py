"""The refresh of single matrices: the compiled operator on the device against the CPU's, and against what is true of any."""

from __future__ import annotations

import torch
from torch import Tensor

from ..results import Row, significant
from .common import Pieces, synchronize

SIZES = (5, 32, 100, 192, 320)  # a warp each; a block each; panels
QUICK_SIZES = (5, 32, 100, 240)  # an H100's block holds 231


def matrices(d: int) -> tuple[Tensor, Tensor]:
    """A Gram of falling eigenvalues, and an orthogonal basis that is not its own."""
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(d, d + 8, generator=generator) * torch.logspace(0, -2, d)[:, None]
    q = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q.contiguous()
    return x @ x.T / d, q


def refreshed(d: int, device: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """(Q', order, Q^T Q', outcome) of one matrix, on the CPU; Q' in float64."""
    gram, basis = (x.to(device) for x in matrices(d))
    order = torch.full((d,), -1, dtype=torch.int64, device=device)
    rotation, outcome = torch.full_like(gram, torch.nan), torch.full((1,), -1, dtype=torch.int32, device=device)
    torch.ops.soap_opt.refresh_basis_([gram], [basis], [order], [rotation], outcome, -1.0, None)
    synchronize(device)
    return basis.cpu().double(), order.cpu(), rotation.cpu().double(), int(outcome)


def check(d: int, device: str) -> Row:
    gram, old = (x.double() for x in matrices(d))
    basis, order, rotation, outcome = refreshed(d, device)
    expected, expected_order, _, _ = refreshed(d, "cpu")
    signs = torch.where((basis * expected).sum(0) < 0, -1.0, 1.0)
    exact = torch.linalg.qr(gram @ old[:, expected_order]).Q
    exact_signs = torch.where((basis * exact).sum(0) < 0, -1.0, 1.0)
    return {
        "d": d,
        "outcome": outcome,  # 1: refreshed
        "not_orthogonal": significant(float((basis.T @ basis - torch.eye(d)).norm()), 2),
        "from_cpu": significant(float((basis * signs - expected).norm(dim=0).max()), 2),  # the worst column
        "from_float64": significant(float((basis * exact_signs - exact).norm(dim=0).max()), 2),
        "rotation_error": significant(float((rotation - old.T @ basis).norm()), 2),
        "order_as_cpu": bool(torch.equal(order, expected_order)),
    }


def check_all(device: str, pieces: Pieces, sizes: tuple[int, ...] = SIZES) -> list[Row]:
    rows = [pieces.run(f"refresh of d = {d}", check, d, device) for d in sizes]
    return [row for row in rows if row is not None]
