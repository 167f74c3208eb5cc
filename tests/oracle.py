"""A naive SOAP written from the algorithm's definition, to check the package's specification itself.

One parameter at a time, one mode product at a time (tensordot), no layouts, no Kronecker products, nothing in place but
the parameter. Nothing of soap_opt is used. State has soap_opt's flat keys, so that it can be copied over in lockstep.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

DEFAULTS: dict[str, Any] = {
    "lr": 3e-3,
    "betas": (0.95, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.01,
    "shampoo_beta": None,
    "precondition_frequency": 10,
    "max_precond_dim": 10000,
    "merge_dims": False,
    "precondition_1d": False,
    "normalize_grads": False,
    "data_format": "channels_first",
    "correct_bias": True,
    "refresh": "together",
    "refresh_tolerance": 0.01,
    "maximize": False,
}


def merged_shape(shape: list[int], limit: int) -> list[int]:
    """Greedy from the left: neighbours are multiplied while the product is at most ``limit``; ones vanish in a run.

    As in the original, a size beyond the limit opens a run of its own when another run was open before it, and nothing
    fits into that run any more; otherwise it is written down at once.
    """
    result: list[int] = []
    run = 1
    for size in shape:
        if run * size <= limit:
            run *= size
        elif run == 1:
            result.append(size)
        else:
            result.append(run)
            run = size
    if run > 1 or not result:
        result.append(run)
    return result


class View:
    """The merged view of a parameter: where its modes are and which of them are preconditioned."""

    def __init__(self, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        self.shape = tuple(shape)
        self.permutation = list(range(len(shape)))
        self.merged = list(shape)
        if options["merge_dims"] and math.prod(shape) > 0:
            if options["data_format"] == "channels_last" and len(shape) == 4:
                self.permutation = [0, 3, 1, 2]
            self.merged = merged_shape([shape[i] for i in self.permutation], options["max_precond_dim"])
        matrix_like = len(shape) >= 2 or (len(shape) == 1 and options["precondition_1d"])
        self.modes = [
            i
            for i, size in enumerate(self.merged)
            if matrix_like and math.prod(shape) > 0 and size > 1 and size <= options["max_precond_dim"]
        ]

    def see(self, x: Tensor) -> Tensor:
        return x.permute(self.permutation).contiguous().view(self.merged)

    def unsee(self, y: Tensor) -> Tensor:
        back = [self.permutation.index(i) for i in range(len(self.permutation))]
        return y.contiguous().view([self.shape[i] for i in self.permutation]).permute(back)


def mode_product(x: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """(X x_i M)[.., j, ..] = sum_a X[.., a, ..] M[a, j]."""
    return torch.tensordot(x, matrix, dims=([mode], [0])).movedim(-1, mode)


def contraction(x: Tensor, mode: int) -> Tensor:
    """X contracted with itself over all modes but one; added up in float64, so that the oracle is not the noisy one."""
    others = [i for i in range(x.dim()) if i != mode]
    return torch.tensordot(x.double(), x.double(), dims=(others, others)).to(x.dtype)


def to_eigenbasis(x: Tensor, state: dict[str, Tensor], view: View) -> Tensor:
    y = view.see(x)
    for i in view.modes:
        y = mode_product(y, state[f"basis_{i}"].to(x.dtype), i)
    return view.unsee(y)


def from_eigenbasis(x: Tensor, state: dict[str, Tensor], view: View) -> Tensor:
    y = view.see(x)
    for i in view.modes:
        y = mode_product(y, state[f"basis_{i}"].to(x.dtype).T, i)
    return view.unsee(y)


def power_iteration(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order, e (unsorted), Q' and R of qr(G Q, columns by falling e)."""
    product = gram @ basis
    eigenvalues = torch.diagonal(basis.T @ product)
    order = torch.argsort(eigenvalues, descending=True, stable=True)
    new_basis, triangle = torch.linalg.qr(product[:, order])
    return order, eigenvalues, new_basis, triangle


class Oracle:
    """``Oracle(params, **options).step(grads)``; ``state[i]`` is the state of parameter i."""

    def __init__(self, params: list[Tensor], **options: Any) -> None:
        assert set(options) <= set(DEFAULTS), set(options) - set(DEFAULTS)
        self.options = {**DEFAULTS, **options}
        self.params = [p.detach().clone() for p in params]
        self.views = [View(tuple(p.shape), self.options) for p in params]
        self.state: list[dict[str, Tensor]] = [{} for _ in params]

    @property
    def shampoo_beta(self) -> float:
        beta = self.options["shampoo_beta"]
        return self.options["betas"][1] if beta is None or beta < 0 else beta

    def step(self, grads: list[Tensor | None]) -> None:
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            wide = torch.float64 if self.params[i].dtype == torch.float64 else torch.float32
            grad = grad.to(wide)
            if not torch.isfinite(grad.square().sum()):
                continue
            if self.options["maximize"]:
                grad = -grad
            if not self.state[i]:
                self._allocate(i, wide)
            if bool(self.state[i]["initialized"]):
                self._step_one(i, grad)
            elif grad.abs().sum() > 0:
                self._initialize(i, grad)

    def _allocate(self, i: int, dtype: torch.dtype) -> None:
        state = self.state[i]
        state["step"] = torch.tensor(0.0)
        state["initialized"] = torch.tensor(False)
        state["exp_avg"] = torch.zeros_like(self.params[i], dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(self.params[i], dtype=dtype)
        for mode in self.views[i].modes:
            size = self.views[i].merged[mode]
            state[f"gram_{mode}"] = torch.zeros(size, size, dtype=dtype, device=self.params[i].device)
            state[f"basis_{mode}"] = torch.zeros(size, size, dtype=dtype, device=self.params[i].device)
            state[f"refresh_offset_{mode}"] = torch.tensor(0)

    def _initialize(self, i: int, grad: Tensor) -> None:
        state, view = self.state[i], self.views[i]
        for mode in view.modes:
            gram = (1 - self.shampoo_beta) * contraction(view.see(grad), mode)
            damped = gram + 1e-30 * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
            state[f"gram_{mode}"] = gram
            state[f"basis_{mode}"] = torch.linalg.eigh(damped).eigenvectors.flip(1).contiguous()
        state["initialized"] = torch.tensor(True)

    def _step_one(self, i: int, grad: Tensor) -> None:
        state, view, o = self.state[i], self.views[i], self.options
        beta1, beta2 = o["betas"]
        state["step"] = state["step"] + 1
        t = int(state["step"])

        turned = to_eigenbasis(grad, state, view)
        state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * turned
        state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * turned**2
        update = from_eigenbasis(state["exp_avg"] / (state["exp_avg_sq"].sqrt() + o["eps"]), state, view)
        if o["normalize_grads"]:
            update = update / (1e-30 + update.square().mean().sqrt())
        correction = math.sqrt(1 - beta2**t) / (1 - beta1**t) if o["correct_bias"] else 1.0
        lr = float(o["lr"])
        moved = self.params[i].to(grad.dtype) - lr * correction * update
        self.params[i].copy_(moved * (1 - lr * o["weight_decay"]))

        beta = self.shampoo_beta
        for mode in view.modes:
            state[f"gram_{mode}"] = beta * state[f"gram_{mode}"] + (1 - beta) * contraction(view.see(grad), mode)
        for mode in view.modes:
            if self._due(t, int(state[f"refresh_offset_{mode}"]), state[f"gram_{mode}"], state[f"basis_{mode}"]):
                self._refresh(state, view, mode)

    def _due(self, t: int, offset: int, gram: Tensor, basis: Tensor) -> bool:
        if self.options["refresh"] == "together":
            offset = 0
        if t == 0 or (t + offset) % self.options["precondition_frequency"] != 0:
            return False
        if self.options["refresh"] != "adaptive":
            return True
        rotated = basis.T @ gram @ basis
        off = rotated - torch.diag(torch.diagonal(rotated))
        norm = torch.linalg.matrix_norm(gram @ basis)
        return bool(norm > 0) and bool(torch.linalg.matrix_norm(off) > self.options["refresh_tolerance"] * norm)

    @staticmethod
    def _refresh(state: dict[str, Tensor], view: View, mode: int) -> None:
        basis = state[f"basis_{mode}"]
        order, _, new_basis, _ = power_iteration(state[f"gram_{mode}"], basis)
        state["exp_avg_sq"] = view.unsee(view.see(state["exp_avg_sq"]).index_select(mode, order))
        state["exp_avg"] = view.unsee(mode_product(view.see(state["exp_avg"]), basis.T @ new_basis, mode))
        state[f"basis_{mode}"] = new_basis


def original_state_dict(oracle: Oracle, exp_avg_space: str = "eigenbasis", flip_size_one: bool = False) -> dict[str, Any]:
    """The oracle's run as a checkpoint in the layout of the original SOAP (github.com/nikhilvyas/SOAP).

    Args:
        exp_avg_space: "parameter" for the layout before its "momentum change".
        flip_size_one: the 1 x 1 bases of modes of size 1, which it keeps too, are -1 (an eigenvector's sign is free);
            then m, which is kept in that basis, has the other sign.
    """
    o = oracle.options
    state: dict[int, dict[str, Any]] = {}
    for i, (view, raw) in enumerate(zip(oracle.views, oracle.state)):
        if not raw:
            continue
        exp_avg = raw["exp_avg"].clone()
        if exp_avg_space == "parameter":
            exp_avg = from_eigenbasis(exp_avg, raw, view)
        grams, bases = [], []
        one_dimensional = len(view.shape) == 1
        for mode, size in enumerate(() if not view.shape and not o["merge_dims"] else view.merged):
            if mode in view.modes:
                grams.append(raw[f"gram_{mode}"].clone())
                bases.append(raw[f"basis_{mode}"].clone())
            elif size == 1 and size <= o["max_precond_dim"] and (not one_dimensional or o["precondition_1d"]):
                sign = -1.0 if flip_size_one else 1.0
                grams.append(torch.full((1, 1), 0.25, dtype=exp_avg.dtype))
                bases.append(torch.full((1, 1), sign, dtype=exp_avg.dtype))
                if exp_avg_space == "eigenbasis":
                    exp_avg *= sign
            else:
                grams.append([])
                bases.append([])
        state[i] = {
            "step": int(raw["step"]),
            "exp_avg": exp_avg,
            "exp_avg_sq": raw["exp_avg_sq"].clone(),
            "GG": grams,
            "Q": bases,
            "precondition_frequency": o["precondition_frequency"],
            "shampoo_beta": oracle.shampoo_beta,
        }
    group = {
        **{name: o[name] for name in ("lr", "betas", "eps", "weight_decay", "precondition_frequency", "max_precond_dim")},
        **{name: o[name] for name in ("merge_dims", "precondition_1d", "normalize_grads", "correct_bias")},
        "shampoo_beta": -1 if o["shampoo_beta"] is None else o["shampoo_beta"],
        "params": list(range(len(oracle.params))),
    }
    return {"state": state, "param_groups": [group]}
