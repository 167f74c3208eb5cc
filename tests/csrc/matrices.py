"""Matrices that QR algorithms fail on, and the gate that tells a good QR from a bad one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

EPS = float(torch.finfo(torch.float32).eps)
RECORDED = Path(__file__).with_name("recorded_grams.npz")


def _orthogonal(d: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def _with_eigenvalues(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    q = _orthogonal(len(values), rng)
    return q * values @ q.T


def _random(d, rng):
    return rng.standard_normal((d, d))


def _gram(d, rng):
    x = rng.standard_normal((d, d + 2))
    return x @ x.T


def _rank_deficient(d, rng):
    x = rng.standard_normal((d, (d + 1) // 2))
    return x @ x.T


def _nearly_rank_deficient(d, rng):
    return _with_eigenvalues(np.where(np.arange(d) < (d + 1) // 2, 1.0, 1e-7), rng)


def _clustered(d, rng):
    """Four clusters, their members 1e-6 apart."""
    return _with_eigenvalues(10.0 ** -(np.arange(d) * 4 // max(d, 1)) * (1 + 1e-6 * np.arange(d)), rng)


def _repeated(d, rng):
    return _with_eigenvalues(np.where(np.arange(d) % 2 == 0, 2.0, 1.0), rng)


def _collinear(d, rng):
    return np.outer(rng.standard_normal(d), np.ones(d)) + 1e-5 * rng.standard_normal((d, d))


def _row_scaled(d, rng):
    return rng.standard_normal((d, d)) * np.logspace(-6, 6, d)[rng.permutation(d), None]


def _column_scaled(d, rng):
    return rng.standard_normal((d, d)) * np.logspace(-6, 6, d)[rng.permutation(d)]


def _banded(d, rng):
    i = np.arange(d)
    return rng.standard_normal((d, d)) * (abs(i[:, None] - i) <= 2)


def _identity(d, rng):
    return np.eye(d)


def _zero(d, rng):
    return np.zeros((d, d))


def _one_column(d, rng):
    x = np.zeros((d, d))
    x[:, d // 2] = rng.standard_normal(d)
    return x


def _hilbert(d, rng):
    i = np.arange(d)
    return 1 / (1 + i[:, None] + i)


def _condition_1e12(d, rng):
    return _with_eigenvalues(np.logspace(0, -12, d), rng)


def _tiny(d, rng):
    """The Gram of gradients of 1e-15, without any entry's square in float32's range."""
    return 1e-30 * _gram(d, rng)


def _huge(d, rng):
    return 1e33 * _gram(d, rng)


def _blocks_apart(d, rng):
    """A block of 1e-16 of the other: its columns' squares are out of float32's range, but their directions are exact."""
    x = np.zeros((d, d))
    half = (d + 1) // 2
    x[:half, :half] = _gram(half, rng)
    if half < d:
        x[half:, half:] = 1e-22 * _gram(d - half, rng)
    return x


KINDS = {
    function.__name__[1:]: function
    for function in (
        _random,
        _gram,
        _rank_deficient,
        _nearly_rank_deficient,
        _clustered,
        _repeated,
        _collinear,
        _row_scaled,
        _column_scaled,
        _banded,
        _identity,
        _zero,
        _one_column,
        _hilbert,
        _condition_1e12,
        _tiny,
        _huge,
        _blocks_apart,
    )
}


def make(kind: str, d: int, seed: int = 0) -> np.ndarray:
    """A matrix [d, d] float32."""
    return KINDS[kind](d, np.random.default_rng([seed, d, len(kind)])).astype(np.float32)


def orthogonal(d: int, seed: int = 0) -> np.ndarray:
    """[d, d] float32, orthogonal to rounding."""
    return _orthogonal(d, np.random.default_rng([seed, d])).astype(np.float32)


def recorded_grams() -> dict[str, np.ndarray]:
    """Grams of learned image compression models in training (record_grams.py), name -> [d, d] float32."""
    with np.load(RECORDED) as file:
        return {name: file[name] for name in file.files}


class Quality(NamedTuple):
    orthogonality: float  # ||Q^T Q - I||_F
    residual: float  # ||A - Q triu(Q^T A)||_F / ||A||_F
    below: float  # ||tril(Q^T A, -1)||_F / ||A||_F: R is upper triangular


def quality(a: np.ndarray, q: np.ndarray) -> Quality:
    """How good q [d, d] is as the Q of a = Q R [d, d], in float64."""
    a, q = (torch.from_numpy(np.array(x, dtype=np.float64)) for x in (a, q))
    # a power of two: squares of 1e-30 are far inside float64, those of R's rounding are not
    a = a / 2.0 ** math.floor(math.log2(float(a.abs().max()))) if a.any() else a
    norm = float(a.norm()) or 1.0
    r = q.T @ a
    return Quality(
        float((q.T @ q - torch.eye(len(q), dtype=torch.float64)).norm()),
        float((a - q @ r.triu()).norm()) / norm,
        float(r.tril(-1).norm()) / norm,
    )


def lapack(a: np.ndarray) -> np.ndarray:
    """LAPACK's Q of a, in float32."""
    return torch.linalg.qr(torch.from_numpy(np.array(a, dtype=np.float32))).Q.numpy()


def allowed(reference: Quality, d: int) -> Quality:
    """Three times what LAPACK does itself on the same matrix, and 4 eps sqrt(d)."""
    return Quality(*(3 * value + 4 * EPS * math.sqrt(d) for value in reference))


def complaints(a: np.ndarray, q: np.ndarray, reference: Quality | None = None) -> list[str]:
    """What is wrong with q as the Q of a; empty where nothing is. reference: LAPACK's, by default on a itself."""
    got, limits = quality(a, q), allowed(reference or quality(a, lapack(a)), len(a))
    return [
        f"{name} {value:.3g} > {limit:.3g}"
        for name, value, limit in zip(Quality._fields, got, limits)
        if not value <= limit  # NaN fails
    ]
