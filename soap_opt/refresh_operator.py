"""The compiled refresh, soap_opt::refresh_basis_: where it is missing, its limits on CUDA, and its call."""

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


WARP_LIMIT = 32  # CUDA: a warp refreshes a matrix up to this size, a block a larger one (kWarpLimit)
LARGEST = 256  # no block refreshes a matrix above this size, whatever its shared memory (kBlockLimit)
SMALL_TABLE_ROWS = 32  # a launch of more matrices runs another kernel (kSmallTableRows)


def block_shared_memory(d: int) -> int:
    """Bytes of shared memory of a block that refreshes one matrix [d, d] (block_shared_floats, csrc/cuda/block.cuh)."""
    panel = 16
    return 4 * (d * (d | 1) + panel * d + 2 * panel * panel + panel + 64)


def largest_in_shared_memory(limit: int) -> int:
    """The largest d that fits in ``limit`` bytes. On CUDA a larger matrix takes a sequence of ATen calls."""
    return max(d for d in range(WARP_LIMIT + 1, LARGEST + 1) if block_shared_memory(d) <= limit)


def refresh_bases_(
    grams: Sequence[Tensor],
    bases: Sequence[Tensor],
    tolerance: float = -1.0,
    due: Tensor | None = None,
) -> tuple[list[Refresh], Tensor]:
    """:func:`soap_opt.eigenbasis.refresh_basis` for a ragged set of matrices on one device, in one call.

    Args:
        grams: [d, d] float32 or float64, contiguous; d may differ.
        bases: [d, d], contiguous: Q before the call, Q' after it.
        tolerance: a basis with off(Q^T G Q) <= tolerance ||Q^T G Q||_F is kept; negative: every due basis is refreshed.
        due: [n] bool on the matrices' device; None for all.

    Returns:
        For each matrix its Refresh (identities where nothing changed; ``basis`` is the tensor in ``bases``), and the outcomes
        [n] int32 on the device. Reading the outcomes waits for the device; the call itself does not.
    """
    if not grams:
        return [], torch.empty(0, dtype=torch.int32)
    orders = [gram.new_empty(gram.shape[0], dtype=torch.int64) for gram in grams]
    rotations = [torch.empty_like(gram) for gram in grams]
    outcomes = grams[0].new_full((len(grams),), -1, dtype=torch.int32)  # -1: orders and rotations are not identities yet
    torch.ops.soap_opt.refresh_basis_(list(grams), list(bases), orders, rotations, outcomes, tolerance, due)
    return [Refresh(*parts) for parts in zip(orders, bases, rotations)], outcomes
