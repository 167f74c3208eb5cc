"""A straightforward SOAP: the published algorithm with every pass that the original implementation makes.

This is the yardstick of the benchmarks, not part of the package: exp_avg is kept in the eigenbasis and turned to parameter
space and back at every step, every product is a tensordot, every basis is refreshed by an own QR in the same step. Written
from arXiv 2409.11321 and the description of the original's steps; its options are the original's defaults.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ReferenceSOAP(torch.optim.Optimizer):
    """SOAP as published; parameters of rank 2 and more are preconditioned, all others get Adam."""

    def __init__(
        self, params, lr=3e-3, betas=(0.95, 0.95), eps=1e-8, weight_decay=0.01, precondition_frequency=10, max_precond_dim=10000
    ):
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            precondition_frequency=precondition_frequency,
            max_precond_dim=max_precond_dim,
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad, state = p.grad, self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(grad)
                    state["exp_avg_sq"] = torch.zeros_like(grad)
                    preconditioned = [grad.dim() > 1 and d <= group["max_precond_dim"] for d in grad.shape]
                    state["grams"] = [grad.new_zeros(d, d) if on else None for d, on in zip(grad.shape, preconditioned)]
                    self._update_grams(grad, state, group)
                    state["bases"] = [None if g is None else _eigenbasis(g) for g in state["grams"]]
                    continue  # the first step only makes the basis
                self._update(p, grad, state, group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        beta1, beta2 = group["betas"]
        state["step"] += 1
        projected = _turn(grad, state["bases"], contract=0)
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        exp_avg.mul_(beta1).add_(projected, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).add_(projected.square(), alpha=1 - beta2)
        update = _turn(exp_avg / (exp_avg_sq.sqrt() + group["eps"]), state["bases"], contract=1)
        correction = (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
        p.add_(update, alpha=-group["lr"] * correction)
        if group["weight_decay"] > 0:
            p.add_(p, alpha=-group["lr"] * group["weight_decay"])

        state["exp_avg"] = _turn(exp_avg, state["bases"], contract=1)
        self._update_grams(grad, state, group)
        if state["step"] % group["precondition_frequency"] == 0:
            self._refresh(state)
        state["exp_avg"] = _turn(state["exp_avg"], state["bases"], contract=0)

    @staticmethod
    def _update_grams(grad: Tensor, state: dict, group: dict) -> None:
        for i, gram in enumerate(state["grams"]):
            if gram is not None:
                others = [j for j in range(grad.dim()) if j != i]
                gram.lerp_(torch.tensordot(grad, grad, dims=[others, others]), 1 - group["betas"][1])

    @staticmethod
    def _refresh(state: dict) -> None:
        for i, (gram, basis) in enumerate(zip(state["grams"], state["bases"])):
            if gram is not None:
                eigenvalues = torch.diag(basis.T @ gram @ basis)
                order = torch.argsort(eigenvalues, descending=True)
                state["exp_avg_sq"] = state["exp_avg_sq"].index_select(i, order)
                state["bases"][i] = torch.linalg.qr(gram @ basis[:, order]).Q


def _eigenbasis(gram: Tensor) -> Tensor:
    damping = 1e-30 * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return torch.linalg.eigh(gram + damping).eigenvectors.flip(1)


def _turn(x: Tensor, bases: list[Tensor | None], contract: int) -> Tensor:
    """Mode products with every basis (contract=0: into the eigenbasis, 1: out of it)."""
    for basis in bases:
        if basis is None:
            x = x.movedim(0, -1)
        else:
            x = torch.tensordot(x, basis, dims=[[0], [contract]])
    return x
