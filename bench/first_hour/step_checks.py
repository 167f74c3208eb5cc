"""Whole fused steps against the specification on the same device: each from the specification's state, errors as numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import soap_opt

from ..results import Row, significant
from .common import synchronize
from .stage_checks import SHAPES, TINY

STEPS = 4  # the first makes the bases alone
NEVER = 10**6

# name -> options; refreshes are switched off where they are not what is looked at
CASES: dict[str, dict[str, Any]] = {
    "plain": {"precondition_frequency": NEVER},
    "bfloat16": {"precondition_frequency": NEVER, "dtype": torch.bfloat16},
    "float16": {"precondition_frequency": NEVER, "dtype": torch.float16},
    "clipped, normalised": {"precondition_frequency": NEVER, "max_grad_norm": 1.0, "normalize_grads": True},
    "precision high": {"precondition_frequency": NEVER, "precision": "high"},
    "refreshed every step": {"precondition_frequency": 1},
    "capturable, adaptive": {"precondition_frequency": 1, "capturable": True, "refresh": "adaptive"},
}


class Run:
    """SOAP on its own copy of drawn parameters."""

    def __init__(self, device: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = [0.1 * torch.randn(shape, generator=generator) for shape in shapes]
        self.params = [torch.nn.Parameter(x.to(device, dtype)) for x in drawn]
        self.optimizer = soap_opt.SOAP(self.params, lr=0.01, weight_decay=0.1, **options)

    def step(self, grads: list[Tensor]) -> None:
        for p, grad in zip(self.params, grads):
            p.grad = grad.clone()
        self.optimizer.step()
        self.optimizer.wait_for_refresh()

    def adopt(self, other: Run) -> None:
        """Take over the other's parameters and state."""
        for mine, theirs in zip(self.params, other.params):
            mine.data.copy_(theirs.data)
            for key, value in other.optimizer.state.get(theirs, {}).items():
                self.optimizer.state[mine][key].copy_(value)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


def differences(spec: Run, tested: Run, before: list[Tensor]) -> dict[str, float]:
    """The worst over all parameters. A refreshed column's sign is anyone's choice: m is compared without signs."""
    worst: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        worst[name] = value if value != value or value > worst.get(name, 0.0) else worst.get(name, 0.0)

    for p, q, old in zip(spec.params, tested.params, before):
        note("step", relative(q.data.double() - old.double(), p.data.double() - old.double()))
        for key, want in spec.optimizer.state[p].items():
            got = tested.optimizer.state[q][key]
            if key.startswith("basis"):
                identity = torch.eye(len(got), device=got.device)
                note("not orthogonal", float((got.T @ got - identity).norm()))
                note("basis", float(((got * want).sum(0).abs() - 1).abs().max()))
            elif key.startswith("gram"):
                note("gram", relative(got, want))
            elif key in ("exp_avg", "exp_avg_sq"):
                note(key, relative(got.abs(), want.abs()))
            elif key == "step":
                note("t", abs(float(got) - float(want)))
    return worst


def check(device: str, quick: bool, name: str) -> Row:
    """The worst of three steps in lockstep."""
    options = {**CASES[name]}
    dtype = options.pop("dtype", torch.float32)
    shapes = TINY if quick else SHAPES
    spec, tested = Run(device, shapes, dtype, foreach=False, **options), Run(device, shapes, dtype, fused=True, **options)
    generator = torch.Generator().manual_seed(1)
    row: Row = {"case": name}
    for number in range(STEPS):
        grads = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        if number > 0:
            tested.adopt(spec)
        before = [p.detach().clone() for p in spec.params]
        spec.step(grads)
        tested.step(grads)
        synchronize(device)
        if number > 0:
            for what, value in differences(spec, tested, before).items():
                row[what] = value if value != value or value > row.get(what, 0.0) else row.get(what, 0.0)
    return {key: significant(value, 2) if isinstance(value, float) else value for key, value in row.items()}


def check_graph(quick: bool) -> Row:
    """A recorded step, replayed, against the same steps one by one: with panels too (320 is beyond a block's shared memory)."""
    shapes = TINY if quick else [*SHAPES, (320, 8)]
    options = {"fused": True, "capturable": True, "precondition_frequency": 3}
    plain, recorded = Run("cuda", shapes, torch.float32, **options), Run("cuda", shapes, torch.float32, **options)
    generator = torch.Generator().manual_seed(2)
    batches = [[torch.randn(shape, generator=generator).cuda() for shape in shapes] for _ in range(12)]
    for grads in batches[:4]:
        plain.step(grads)
        recorded.step(grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded.optimizer.step()
    start = [p.detach().clone() for p in plain.params]
    for grads in batches[4:]:
        plain.step(grads)
        for p, grad in zip(recorded.params, grads):
            p.grad.copy_(grad)
        graph.replay()
    torch.cuda.synchronize()
    moved = [relative(q.data - old, p.data - old) for p, q, old in zip(plain.params, recorded.params, start)]
    t = [float(recorded.optimizer.state[p]["step"]) for p in recorded.params]
    return {"case": "8 replays of a graph", "step": significant(max(moved), 2), "t": max(t) - (len(batches) - 1)}
