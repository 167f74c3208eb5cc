"""The compiled refresh, soap_opt::refresh_basis_, for the lists that :mod:`soap_opt.functional` walks over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _ext
from .eigenbasis import Refresh


def why_missing(device_type: str) -> str | None:
    """Why the operator cannot run on a device of this type; None where it can."""
    if device_type == "cpu":
        return _ext._load_error
    if device_type == "cuda":
        return _ext._cuda_load_error
    return f"soap_opt has no kernels of its own for device type {device_type!r}"


WARP_LIMIT = 32  # CUDA: matrices up to this have a warp, larger ones that fit in shared memory a block (kWarpLimit)
LARGEST = 256  # above this no matrix has a block, whatever its shared memory (kBlockLimit)
SMALL_TABLE_ROWS = 32  # launches of more matrices are other kernels than those of so many (kSmallTableRows)


def block_shared_memory(d: int) -> int:
    """Bytes of shared memory of a block that refreshes one matrix [d, d] (block_shared_floats, csrc/cuda/block.cuh)."""
    panel = 16
    return 4 * (d * (d | 1) + panel * d + 2 * panel * panel + panel + 64)


def largest_in_shared_memory(limit: int) -> int:
    """The largest d that fits in ``limit`` bytes: from there on the operator is a sequence of ATen calls, on CUDA."""
    return max(d for d in range(WARP_LIMIT + 1, LARGEST + 1) if block_shared_memory(d) <= limit)


def refresh_bases_(
    grams: Sequence[Tensor],
    bases: Sequence[Tensor],
    tolerance: float = -1.0,
    due: Tensor | None = None,
    out: tuple[list[Tensor], list[Tensor], Tensor] | None = None,
) -> tuple[list[Refresh], Tensor]:
    """:func:`soap_opt.eigenbasis.refresh_basis` for a ragged set of matrices on one device, in one call.

    Args:
        grams: [d, d] float32 or float64, contiguous; d may differ.
        bases: [d, d] each, contiguous: Q, becomes Q'.
        tolerance: what is off(Q^T G Q) <= tolerance ||Q^T G Q||_F is left alone; negative: nothing is.
        due: [n] bool on the matrices' device; None for all.
        out: what is written: orders [d] int64 and rotations [d, d], one for each matrix, and outcomes [n] int32; None makes
            them. Where an outcome is 0 (kept) on entry the matrix's order and rotation are taken to be identities already; -1
            says nothing.

    Returns:
        For each matrix its Refresh (identities where nothing changed; ``basis`` is the tensor in ``bases``), and the outcomes
        [n] int32 on the device: reading them waits for it, everything before does not.
    """
    if not grams:
        return [], torch.empty(0, dtype=torch.int32)
    if out is None:
        orders = [gram.new_empty(gram.shape[0], dtype=torch.int64) for gram in grams]
        out = orders, [torch.empty_like(gram) for gram in grams], grams[0].new_full((len(grams),), -1, dtype=torch.int32)
    orders, rotations, outcomes = out
    torch.ops.soap_opt.refresh_basis_(list(grams), list(bases), orders, rotations, outcomes, tolerance, due)
    return [Refresh(*parts) for parts in zip(orders, bases, rotations)], outcomes
