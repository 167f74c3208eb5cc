"""The quality of SOAP's bases: their orthogonality, their distance from the Grams' eigenvectors, and the spectra."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..layout import layout_of, memory_order
from ..options import SHAPING
from ..soap import SOAP
from .table import Table, check_model, named_parameters


class BasisHealth(Table):
    """The table of :func:`basis_health`, and ``spectra``: for each (parameter, mode) that has a basis the estimated eigenvalues
    diag(Q^T G Q) [d], float64 on the CPU, in the order of the basis's columns (largest first when it was last refreshed)."""

    def __init__(self) -> None:
        super().__init__()
        self.spectra: dict[tuple[str, int], Tensor] = {}


def basis_health(optimizer: Optimizer, model: nn.Module | None = None) -> BasisHealth:
    """Orthogonality, off-diagonal share and spectrum of every basis of a SOAP optimizer; reads only.

    There is one row for each parameter and mode i of its merged view. With the mode's basis Q, its Gram G and B = Q^T G Q, the
    columns are:

    - ``parameter``, ``shape``, ``mode``, ``size`` (d), ``step`` (t);
    - ``basis``: "yes"; "no" for a mode that is not preconditioned; "later" where the parameter has had no usable gradient yet.
      For "no" and "later" the columns below are NaN;
    - ``orthogonality``: ||Q^T Q - I||_F, a few eps sqrt(d) after LAPACK's QR;
    - ``off_diagonal``: ||B - diag(B)||_F / ||B||_F: 0 for eigenvectors; refresh="adaptive" passes over bases below 0.01;
    - ``largest``, ``smallest``: the extremes of the estimated eigenvalues e = diag(B);
    - ``condition``: largest / smallest, inf where the smallest is not above 0;
    - ``effective_rank``: exp of the entropy of e / sum(e), between 1 and d (Roy and Vetterli, EUSIPCO 2007).

    A Gram of zeros has off_diagonal 0, and NaN for condition and effective rank. The call computes in float64, one mode after
    the other; a mode takes 6 d^3 flops, and 40 d^2 bytes for the time.

    Args:
        optimizer: a :class:`soap_opt.SOAP`.
        model: gives the parameters their names; None: the optimizer's names for them, or their numbers.

    Returns:
        A :class:`Table`: ``print`` it, ``to_csv(path)``; ``.spectra`` holds all eigenvalues.

    Raises:
        TypeError: the optimizer is not a SOAP.
    """
    if not isinstance(optimizer, SOAP):
        raise TypeError(f"basis_health looks at soap_opt.SOAP, got {type(optimizer).__name__}")
    check_model(model)
    optimizer.wait_for_refresh()
    result = BasisHealth()
    for name, group, param in named_parameters(optimizer.param_groups, model):
        if is_lazy(param):  # it has no shape yet
            continue
        state = optimizer.state.get(param, {})
        layout = layout_of(tuple(param.shape), memory_order(param), **{option: group[option] for option in SHAPING})
        for mode, size in enumerate(layout.view_shape):
            basis = state.get(f"basis_{mode}") if state and state["initialized"] else None
            row = {
                "parameter": name,
                "shape": "x".join(map(str, param.shape)),
                "mode": mode,
                "size": size,
                "step": int(state["step"]) if state else 0,
                "basis": "no" if mode not in layout.modes else "later" if basis is None else "yes",
            }
            numbers = dict.fromkeys(COLUMNS, math.nan)
            if basis is not None:
                numbers, result.spectra[name, mode] = _health(state[f"gram_{mode}"], basis)
            result.append({**row, **numbers})
    return result


COLUMNS = ("orthogonality", "off_diagonal", "largest", "smallest", "condition", "effective_rank")


@torch.no_grad()
def _health(gram: Tensor, basis: Tensor) -> tuple[dict[str, float], Tensor]:
    """The values of COLUMNS for one mode, and its e [d]. gram, basis: [d, d]."""
    if basis.device.type == "mps":  # MPS has no float64
        gram, basis = gram.cpu(), basis.cpu()
    q = basis.double()
    turned = q.T @ (gram.double() @ q)
    eigenvalues = turned.diagonal().clone()
    norm = float(torch.linalg.matrix_norm(turned))
    off = float(torch.linalg.matrix_norm(turned.fill_diagonal_(0)))
    error = float(torch.linalg.matrix_norm((q.T @ q).sub_(torch.eye(len(q), dtype=q.dtype, device=q.device))))
    largest, smallest = float(eigenvalues.max()), float(eigenvalues.min())
    shares = eigenvalues.clamp(min=0)
    shares = shares / shares.sum()  # NaN for a Gram of zeros
    if largest > 0:
        condition = largest / smallest if smallest > 0 else math.inf
    else:
        condition = math.nan
    numbers = (
        error,
        0.0 if norm == 0 else off / norm,
        largest,
        smallest,
        condition,
        math.exp(float(torch.special.entr(shares).sum())),
    )
    return dict(zip(COLUMNS, numbers)), eigenvalues.cpu()
