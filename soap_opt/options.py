"""The hyper-parameters of a param group: the one list of their names, defaults and ranges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from numbers import Integral
from operator import itemgetter
from typing import Any

from torch import Tensor

from .schedule import POLICIES, tolerance_of

REFUSED = {
    "amsgrad": "the running maximum of v would mix coordinates of different eigenbases after every refresh",
    "decoupled_weight_decay": "weight decay is always decoupled here, as with AdamW; leave it out",
    "differentiable": "a step through eigh and QR of nearly equal eigenvalues has no usable derivative",
}

LARGEST_LR = 3.4e38  # about float32's largest number

# Bytes of the two scratch buffers of one CUDA plan. Larger models are stepped piece by piece.
SCRATCH_LIMIT = 1 << 31


def _option(role: str, default: Any) -> Any:
    """A field for a hyper-parameter with this default. role: see :class:`Options`."""
    return field(default=default, metadata={"role": role})


_own, _step, _shape, _call, _group, _path = (partial(_option, r) for r in ("own", "step", "shape", "call", "group", "path"))


@dataclass(frozen=True)
class Options:
    """The hyper-parameters of a param group, in the order and with the meanings of :class:`soap_opt.SOAP`'s arguments.

    Every option has a role. The role says whether parameters must have the same value to be stepped by one call:

    - own: every parameter may have a value of its own.
    - step: the arithmetic of a step. A call on the CPU has one value for all parameters; the CUDA kernels read one row of
      values for each param group.
    - shape: the shapes, or the meaning, of the state. The value is pinned as soon as a parameter has state.
    - call: the behaviour of a call of the CUDA path, for all of its parameters.
    - group: applies to the group as a whole.
    - path: the choice of the implementation.
    """

    lr: float | Tensor = _own(3e-3)
    betas: tuple[float, float] = _step((0.95, 0.95))
    eps: float = _step(1e-8)
    weight_decay: float = _own(0.01)
    shampoo_beta: float | None = _step(None)
    precondition_frequency: int = _step(10)
    max_precond_dim: int = _shape(10000)
    merge_dims: bool = _shape(False)
    precondition_1d: bool = _shape(False)
    normalize_grads: bool = _step(False)
    data_format: str = _shape("channels_first")
    correct_bias: bool = _step(True)
    refresh: str = _step("staggered")
    refresh_tolerance: float = _step(0.01)
    refresh_start: int = _group(0)
    maximize: bool = _step(False)
    max_grad_norm: float | None = _group(None)
    precision: str = _call("highest")
    overlap_refresh: bool = _call(True)
    scratch_limit: int = _call(SCRATCH_LIMIT)
    capturable: bool = _call(False)
    foreach: bool | None = _path(None)
    fused: bool | None = _path(None)

    @classmethod
    def of(cls, group: dict[str, Any]) -> Options:
        """The options of a param group, which has a value for every one of them."""
        return cls(*_VALUES(group))

    def check(self) -> None:
        """Check the values, in torch's wording.

        Raises:
            ValueError: a value is out of its range.
            RuntimeError: foreach and fused together.
        """
        lr = self.lr
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
            lr = float(lr) if lr.device.type == "cpu" else 0.0  # a value on a device is not checked: the host would wait for it
        if not 0.0 <= lr <= LARGEST_LR:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not 0.0 <= self.eps:
            raise ValueError(f"Invalid epsilon value: {self.eps}")
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas}")
        for i, beta in enumerate(self.betas):
            if isinstance(beta, Tensor):
                raise ValueError(f"betas must be floats, but index {i} is a Tensor: {beta}")
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not 0.0 <= self.weight_decay:
            raise ValueError(f"Invalid weight_decay value: {self.weight_decay}")
        if self.shampoo_beta is not None and not self.shampoo_beta < 1.0:
            raise ValueError(f"Invalid shampoo_beta value: {self.shampoo_beta}")
        for name, least in (("precondition_frequency", 1), ("max_precond_dim", 0), ("refresh_start", 0), ("scratch_limit", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"Invalid {name} value: {value} (an integer of at least {least})")
        if self.data_format not in ("channels_first", "channels_last"):
            raise ValueError(f"Invalid data_format: {self.data_format!r} (channels_first or channels_last)")
        if self.refresh not in POLICIES:
            raise ValueError(f"Invalid refresh policy: {self.refresh!r} (one of {', '.join(POLICIES)})")
        if not 0.0 <= self.refresh_tolerance:
            raise ValueError(f"Invalid refresh_tolerance value: {self.refresh_tolerance}")
        if self.max_grad_norm is not None and not 0.0 < self.max_grad_norm:
            raise ValueError(f"Invalid max_grad_norm value: {self.max_grad_norm}")
        if self.precision not in ("highest", "high"):
            raise ValueError(f"Invalid precision: {self.precision!r} (highest or high)")
        if self.foreach and self.fused:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")

    @property
    def beta1(self) -> float:
        """Decay rate of m."""
        return self.betas[0]

    @property
    def beta2(self) -> float:
        """Decay rate of v."""
        return self.betas[1]

    @property
    def gram_beta(self) -> float:
        """Decay rate of the Grams: shampoo_beta, or beta2 where shampoo_beta is None or negative."""
        beta = self.shampoo_beta
        return self.betas[1] if beta is None or beta < 0 else beta

    @property
    def tolerance(self) -> float:
        """The off-diagonal share up to which a due basis is not refreshed; negative: every due basis is refreshed."""
        return tolerance_of(self.refresh, self.refresh_tolerance)

    def step_row(self) -> list[float]:
        """The options of role step, as the C++ engine takes them: in their order: betas as two numbers, flags as 1 or 0, the
        refresh policy as its index in POLICIES. The record StepOptions in csrc/cpu/step_arguments.h has the same fields."""
        values = {**self.__dict__, "shampoo_beta": self.gram_beta, "refresh": POLICIES.index(self.refresh)}
        values["precondition_frequency"] = min(self.precondition_frequency, 1 << 53)  # (any integer may be given, for never)
        return [*self.betas, *map(float, _STEP(values))]

    def agree_on_cpu(self) -> tuple[Any, ...]:
        """The values that groups must share for one call of the C++ engine or the multi-tensor path."""
        return (*self.betas, *_STEP_AND_PATH(self.__dict__))  # (betas may be a list, which has no hash)

    def agree_on_cuda(self) -> tuple[Any, ...]:
        """The values that groups must share for one call of the CUDA path: the options of role call, and the tolerance, because
        one call of the refresh serves all groups."""
        return (self.tolerance, *_CALL(self.__dict__))


def names_of(*roles: str) -> tuple[str, ...]:
    """Names of the options with these roles, in the order of the fields; of all options where no role is given."""
    return tuple(f.name for f in fields(Options) if not roles or f.metadata["role"] in roles)


_Values = Callable[[dict[str, Any]], tuple[Any, ...]]  # reads several values of a dict

DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Options)}
SHAPING = names_of("shape")
_VALUES: _Values = itemgetter(*names_of())
_STEP: _Values = itemgetter(*(name for name in names_of("step") if name != "betas"))
_STEP_AND_PATH: _Values = itemgetter(*(name for name in names_of("step", "path") if name != "betas"))
_CALL: _Values = itemgetter(*names_of("call"))
