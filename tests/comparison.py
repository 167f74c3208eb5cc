"""The lockstep comparison: before each step the reference's state is copied into what is tested, after it both are compared.

Two correct float32 versions of SOAP drift apart in null spaces, so equality of whole trajectories cannot be asked for
in general; equality of one step from one state can (step_comparison.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from oracle import Oracle
from step_comparison import compare_step
from torch import Tensor

import soap_opt

Grads = Sequence["Tensor | None"]

# What SOAP is given to run each implementation
IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "single": {"foreach": False},
    "multi": {"foreach": True},
    "fused": {"fused": True},
}
NO_ENGINE = soap_opt._ext.unavailable("cpu")
AVAILABLE = [flags for name, flags in IMPLEMENTATIONS.items() if name != "fused" or NO_ENGINE is None]
needs_engine = pytest.mark.skipif(NO_ENGINE is not None, reason=str(NO_ENGINE))


def implementations(*names: str) -> list[Any]:
    """Names of implementations (and "oracle") as test parameters; those that are missing here skip with the reason."""
    return [pytest.param(name, marks=needs_engine) if name == "fused" else name for name in names]


every_implementation = pytest.mark.parametrize(
    "flags",
    [pytest.param(flags, id=name, marks=needs_engine if name == "fused" else ()) for name, flags in IMPLEMENTATIONS.items()],
)


class SoapRun:
    """soap_opt.SOAP on its own copy of the parameters."""

    def __init__(self, params: Iterable[Tensor], **options: Any) -> None:
        self.params = [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
        self.optimizer = soap_opt.SOAP(self.params, **options)

    def step(self, grads: Grads) -> None:
        for param, grad in zip(self.params, grads):
            param.grad = None if grad is None else grad.clone(memory_format=torch.preserve_format)
        self.optimizer.step()

    def state_of(self, i: int) -> dict[str, Tensor]:
        self.optimizer.wait_for_refresh()
        return self.optimizer.state.get(self.params[i], {})

    def adopt(self, i: int, param: Tensor, state: dict[str, Tensor]) -> None:
        self.params[i].data.copy_(param)
        own = self.state_of(i)
        assert own.keys() == state.keys(), (own.keys(), state.keys())
        for key, value in state.items():
            own[key].copy_(value)


class Setting:
    """Sets something for a with block and puts the old value back."""

    def __init__(self, get, set_, value):
        self.get, self.set, self.value = get, set_, value

    def __enter__(self):
        self.old = self.get()
        self.set(self.value)

    def __exit__(self, *_):
        assert self.get() == self.value, "the step changed a global setting"
        self.set(self.old)


class OracleRun:
    """The naive SOAP of oracle.py behind the same interface; or an oracle that has been running."""

    def __init__(self, params: Iterable[Tensor] = (), oracle: Oracle | None = None, **options: Any) -> None:
        self.oracle = Oracle(list(params), **options) if oracle is None else oracle
        self.params = self.oracle.params

    def step(self, grads: Grads) -> None:
        self.oracle.step(grads)

    def state_of(self, i: int) -> dict[str, Tensor]:
        return self.oracle.state[i]

    def adopt(self, i: int, param: Tensor, state: dict[str, Tensor]) -> None:
        self.params[i].copy_(param)
        self.oracle.state[i] = {key: value.clone() for key, value in state.items()}


def run_lockstep(
    reference: Any,
    tested: Any,
    gradients: Iterable[Grads],
    options: dict[str, Any],
    before_step: Callable[[int], None] | None = None,
) -> int:
    """Both runs over the same gradients, compared after every step. Returns how many bases were refreshed on the way.

    Args:
        reference: its state is copied into ``tested`` before each step.
        tested: what is judged.
        gradients: for each step the gradients (None for a parameter that has none).
        options: SOAP's options, shared by both (those that the oracle knows).
        before_step: called with the step's index, to change hyper-parameters on the way; may edit ``options``.
    """
    refreshed = 0
    for number, grads in enumerate(gradients):
        if before_step is not None:
            before_step(number)
        before = []
        for i, param in enumerate(reference.params):
            state = {key: value.clone() for key, value in reference.state_of(i).items()}
            before.append((param.detach().clone(), state))
            tested.adopt(i, param.detach(), state)
        reference.step(grads)
        tested.step(grads)
        for i, (param, state) in enumerate(before):
            if not state:  # offsets are an input of the oracle, not its result
                for run, other in ((reference, tested), (tested, reference)):
                    if isinstance(run, OracleRun):
                        offsets = {k: v.clone() for k, v in other.state_of(i).items() if k.startswith("refresh_offset")}
                        run.state_of(i).update(offsets)
            where = f"step {number}, parameter {i} of shape {tuple(param.shape)}"
            after = (reference.params[i].detach(), reference.state_of(i))
            got = (tested.params[i].detach(), tested.state_of(i))
            refreshed += compare_step(param, state, grads[i], after, got, options, where)
    return refreshed


# Every rank from 0 to 5, sizes of 0 and 1, Kronecker pairs
RAGGED = [(8, 8), (6, 4, 3, 3), (5,), (), (17, 3, 4), (1, 7), (2, 3, 1, 4, 2), (0, 3), (40, 33)]


def random_basis(d, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q.to(dtype).contiguous()


def random_params(shapes: Sequence[tuple[int, ...]], seed: int = 0, dtype=torch.float32, device="cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(0.1 * torch.randn(shape, generator=generator)).to(device=device, dtype=dtype) for shape in shapes]


def random_gradients(
    shapes: Sequence[tuple[int, ...]],
    steps: int,
    seed: int = 0,
    dtype=torch.float32,
    device="cpu",
    missing: float = 0.0,
    rank_one: float = 0.0,
) -> list[list[Tensor | None]]:
    """Gradients whose spectrum changes from step to step, so that refreshed eigenvalues do change places.

    Args:
        missing: probability that a parameter has no gradient at a step (never at the first).
        rank_one: probability that a gradient is an outer product, which leaves null spaces.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    result: list[list[Tensor | None]] = []
    for number in range(steps):
        row: list[Tensor | None] = []
        for shape in shapes:
            grad = torch.randn(shape, generator=generator)
            draws = torch.rand(2, generator=generator).tolist()
            if shape and draws[0] < rank_one:
                grad = torch.ones(shape)
                for mode, size in enumerate(shape):
                    along = [1] * len(shape)
                    along[mode] = size
                    grad = grad * torch.randn(size, generator=generator).view(along)
            for mode, size in enumerate(shape):
                along = [1] * len(shape)
                along[mode] = size
                grad = grad * torch.exp(0.5 * torch.randn(size, generator=generator)).view(along)
            row.append(None if number and draws[1] < missing else grad.to(device=device, dtype=dtype))
        result.append(row)
    return result
