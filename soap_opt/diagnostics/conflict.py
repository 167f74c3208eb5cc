"""Conflicts between updates: of several losses within a step, and of consecutive steps. For any torch optimizer.

The measure is the alignment of n vectors (arXiv 2502.00604), which for n = 2 is the cosine of their angle,

    A(v_1, .., v_n) = 2 ||(1/n) sum_i v_i / ||v_i|| ||^2 - 1  =  (2 / n^2) sum_ij cos(v_i, v_j) - 1.

It is 1 where all vectors point one way, and -1 where their directions add up to zero. arXiv 2601.20769 measures it within a
step, for the preconditioned gradients of rate and distortion, and between the updates of consecutive steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import SGD, Adam, Optimizer

from .table import Table, check_model, check_optimizer, named_parameters

Gradients = Sequence["Tensor | None"]  # one for each parameter
Preconditioner = Callable[[Gradients], Gradients]

CHUNK = 1 << 22  # elements that are converted to float64 at a time


def alignment(vectors: Iterable[Tensor | Gradients]) -> float:
    """A(v_1, .., v_n) as above, in float64, between -1 and 1; the cosine for two.

    Args:
        vectors: each a tensor, or a sequence of tensors (None for zeros) that together are one vector, such as a model's
            gradients. All vectors have the same pieces, of any scale and dtype.

    Returns:
        The alignment; NaN where a vector is zero or not finite (it has no direction), or where there are no vectors.

    Raises:
        ValueError: vectors of different shapes, or of different numbers of pieces.

    >>> alignment([torch.tensor([1e-30, 0.0]), torch.tensor([2.0, 2.0])])
    0.7071067811865475
    """
    columns = [[vector] if isinstance(vector, Tensor) else list(vector) for vector in vectors]
    for pieces in zip(*columns):
        if len({tuple(piece.shape) for piece in pieces if piece is not None}) > 1:
            raise ValueError(
                f"vectors must be of one shape, got {', '.join(str(tuple(p.shape)) for p in pieces if p is not None)}"
            )
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"vectors must have as many pieces each, got {', '.join(str(len(column)) for column in columns)}")
    return _of_gram(_grams(columns).sum(0))


def preconditioner_of(optimizer: Optimizer) -> Preconditioner:
    """The preconditioner of an optimizer in its present state, without momentum and learning rate: a function from a list of
    gradients (None where there is none), one for each parameter in the order of ``param_groups``, to the list of updates.

    - an optimizer with a method ``precondition``, as SOAP: that method;
    - Adam, AdamW: ``g / (sqrt(v / (1 - b2^t)) + eps)``, with amsgrad the largest v so far; None where there is no v yet;
    - SGD: g itself.

    Coupled weight decay is left out. With ``maximize`` the function takes -g for g.

    Raises:
        TypeError: the optimizer is none of these.
    """
    check_optimizer(optimizer)
    own: Preconditioner | None = getattr(optimizer, "precondition", None)
    if callable(own):
        return own
    for kind, function in ((Adam, _adam), (SGD, _sgd)):
        if isinstance(optimizer, kind):
            return lambda grads: [
                None if grad is None else function(-grad if group["maximize"] else grad, group, optimizer.state.get(param, {}))
                for (_, group, param), grad in zip(named_parameters(optimizer.param_groups), grads)
            ]
    raise TypeError(
        f"no preconditioner of {type(optimizer).__name__} is known (SOAP's, Adam's, AdamW's and SGD's are): give a function of "
        "a list of gradients as preconditioner=.., or preconditioner=list to look at the gradients alone"
    )


def _adam(grad: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor | None:
    if not state or not (t := float(state["step"])) > 0:
        return None
    v = _as_real(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    denominator = (v / (1 - float(group["betas"][1]) ** t)).sqrt_().add_(group["eps"])
    return torch.where(denominator > 0, _as_real(grad) / denominator, 0)


def _sgd(grad: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    return grad


class ConflictMeter:
    """Alignment of several losses' updates within a step, and of the updates of consecutive steps, every so many steps.

    .. code-block:: python

        meter = ConflictMeter(optimizer, every=50, model=net)
        for x in loader:
            optimizer.zero_grad()
            rate, distortion = losses(net(x), x)
            if meter.due():
                meter.measure(rate, distortion)  # before backward() frees the graph
            (rate + lmbda * distortion).backward()
            optimizer.step()
        meter.records.to_csv("conflict.csv")

    Training is the same, to the bit, as without the meter: gradients come from ``torch.autograd.grad``, which leaves ``p.grad``
    and the generators alone; parameters and state are only read. (The meter's backward passes call hooks on tensors and modules
    like any other, but not DistributedDataParallel: each process measures the gradients of its own batch.)

    *What it costs.* At every ``every``-th step, for n losses: n backward passes through the retained graph, n applications of
    the preconditioner (for SOAP 2 U flops each, U = 2 numel sum(d_i), where a step takes 2.5 to 3 U), and n + 1 copies of the
    gradients while the measurement lasts; and a copy of the parameters in that step, and in the step before it. The column
    "seconds" gives the time. Between measurements the meter costs nothing and holds nothing.

    A model under ``torch.compile`` gives its graph's memory away in the first backward pass: to keep graphs there, set
    ``torch._functorch.config.donated_buffer = False`` before it is compiled.

    *Scales cancel*: a factor of a loss makes no difference, so rate and distortion need no lambda. With GradScaler pass
    ``scaler.scale(rate)`` and so on, so that gradients do not vanish in float16's backward pass. (A gradient need not be linear
    in its loss: CompressAI's LowerBound passes it on by its sign, and there the parts need not add up to the whole.)

    Args:
        optimizer: SOAP, Adam, AdamW, SGD, or any optimizer together with a ``preconditioner``.
        every: measure at the steps ``every``, ``2 every``, .. (default: 50).
        model: gives the parameters their names; None: the optimizer's names for them, or their numbers.
        preconditioner: a function from a list of gradients (None where there is none), one for each parameter of
            ``param_groups``, to the list of updates without the learning rate; None for a parameter that has no update yet.
            Default: :func:`preconditioner_of`.
        step: steps made before, for a run that is resumed (default: 0).

    Attributes:
        records: a :class:`Table` with a row for each measurement: ``step``, counted from 1; ``raw``, the alignment of the
            losses' gradients over all parameters; ``preconditioned``, the alignment of the losses' updates over all parameters;
            ``raw_shared`` and ``preconditioned_shared``, the same over the parameters that every loss reaches (not a decoder's,
            which the rate does not reach); ``between_steps``, A(u_{k-1}, u_k); ``seconds``.
        by_parameter: a :class:`Table` with a row for each measurement and parameter: ``step``, ``parameter``, ``raw``,
            ``preconditioned``, ``between_steps``.
        step: steps made.

    An update u_k is the change that a step has really made to the parameters: with momentum, learning rate, decoupled weight
    decay, clipping, and the rounding of their dtype. (Weight decay of 0.01 is about a thousandth of an update of weights around
    0.05.) Momentum alone brings the alignment of consecutive updates near 1: compare optimizers of equal ``betas[0]``.
    Over the whole model, preconditioned gradients are weighted by their groups' learning rates, as in a step.
    ``preconditioned`` leaves out parameters for which the preconditioner returns None, because they have no second moment yet.

    A value is NaN, and never an error, where a vector has no direction: a loss that does not reach a parameter, a step that
    moved nothing (SOAP's first step, a skipped step), gradients that are not finite; ``between_steps`` where there was no step
    before; ``raw`` and ``preconditioned`` where ``measure`` was not called.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or its preconditioner is not known.
        ValueError: ``every`` below 1, ``step`` below 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        every: int = 50,
        *,
        model: nn.Module | None = None,
        preconditioner: Preconditioner | None = None,
        step: int = 0,
    ) -> None:
        check_optimizer(optimizer)
        check_model(model)
        for name, value, least in (("every", every, 1), ("step", step, 0)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"Invalid {name} value: {value} (an integer of at least {least})")
        self.optimizer, self.every, self.model, self.step = optimizer, every, model, step
        self.preconditioner = preconditioner_of(optimizer) if preconditioner is None else preconditioner
        self.records, self.by_parameter = Table(), Table()
        self._within: dict[str, dict[str, float]] | None = None  # for each column its values by parameter, and the model's
        self._before: dict[Tensor, Tensor] | None = None  # copies of the parameters before the present step
        self._last: dict[Tensor, Tensor] | None = None  # the last step's update of each parameter
        self._seconds = 0.0
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    def due(self) -> bool:
        """Whether the coming step is to be measured and has not been yet."""
        return self._within is None and self._is_due(self.step + 1)

    @torch._disable_dynamo
    def measure(self, *losses: Tensor) -> None:
        """Measure the conflict of these losses in the coming step; to be called before their graph is freed.

        Args:
            losses: two or more scalars, all from the graph that ``backward()`` takes next; a loss without a graph has zero
                gradients.

        Raises:
            ValueError: fewer than two losses, a loss that is not a scalar, or a preconditioner's list of another length.
            TypeError: a loss that is not a tensor.
        """
        if len(losses) < 2:
            raise ValueError(f"measure takes two losses or more, got {len(losses)}")
        for place, loss in enumerate(losses):
            if not isinstance(loss, Tensor):
                raise TypeError(f"losses must be tensors, got {type(loss).__name__} as number {place + 1}")
            if loss.numel() != 1:
                raise ValueError(f"losses must be scalars, but number {place + 1} is of shape {tuple(loss.shape)}")
        started = self._now()
        owners = list(named_parameters(self.optimizer.param_groups, self.model))
        grads = [_gradients(loss, [param for _, _, param in owners]) for loss in losses]  # [n][P]
        raw = _grams(grads)
        supported = [True] * len(owners)
        with torch.no_grad():
            for i in range(len(losses)):  # the updates of a loss replace its gradients
                updates = list(self.preconditioner(grads[i]))
                if len(updates) != len(owners):
                    raise ValueError(f"preconditioner returned {len(updates)} updates for {len(owners)} parameters")
                supported = [ok and (g is None or u is not None) for ok, g, u in zip(supported, grads[i], updates)]
                grads[i] = updates
        preconditioned = _grams(grads)
        self._within = {}
        for name, grams, weights in (
            ("raw", raw, torch.ones(len(owners), dtype=torch.float64)),
            ("preconditioned", preconditioned, _weights([group for _, group, _ in owners]) * torch.tensor(supported)),
        ):
            shared = (grams.diagonal(dim1=1, dim2=2) != 0).all(1)  # [P]; NaN counts as reached, so that the result shows it
            weighted = grams * weights.square()[:, None, None]
            self._within[name] = {
                "": _of_gram(weighted[weights > 0].sum(0)),
                "shared": _of_gram(weighted[shared & (weights > 0)].sum(0)),
                **{key: _of_gram(gram) for (key, _, _), gram in zip(owners, grams)},
            }
        self._seconds += time.perf_counter() - started

    def close(self) -> None:
        """Remove the meter's hooks from the optimizer; the tables stay."""
        for handle in self._handles:
            handle.remove()
        self._before = self._last = self._within = None

    def __enter__(self) -> ConflictMeter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __str__(self) -> str:
        return str(self.records)

    def _is_due(self, step: int) -> bool:
        return step % self.every == 0

    def _now(self) -> float:
        """The time when the devices have finished all work that is queued."""
        for device in {p.device for group in self.optimizer.param_groups for p in group["params"]}:
            if device.type not in ("cpu", "meta"):
                torch.accelerator.synchronize(device)
        return time.perf_counter()

    @torch._disable_dynamo
    def _before_step(self) -> None:
        coming = self.step + 1
        if self._is_due(coming) or self._is_due(coming + 1):
            started = time.perf_counter()
            self._before = {
                p: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
                for _, _, p in named_parameters(self.optimizer.param_groups)
                if p.requires_grad and not is_lazy(p)
            }
            self._seconds += time.perf_counter() - started

    @torch._disable_dynamo
    def _after_step(self) -> None:
        self.step += 1
        before, last, within = self._before, self._last, self._within
        self._before = self._last = self._within = None
        moved = None
        if before is not None:
            started = self._now()
            moved = {p: old.sub_(p.detach()).neg_() for p, old in before.items()}
            self._seconds += time.perf_counter() - started
        if self._is_due(self.step) or within is not None:
            self._record(within or {}, last or {}, moved or {})
        if moved is not None and self._is_due(self.step + 1):
            self._last = moved

    def _record(self, within: dict[str, dict[str, float]], last: dict[Tensor, Tensor], moved: dict[Tensor, Tensor]) -> None:
        started = time.perf_counter()
        named = [(name, param) for name, _, param in named_parameters(self.optimizer.param_groups, self.model)]
        both = [(name, param) for name, param in named if param in last and param in moved]
        grams = _grams([[of[param] for _, param in both] for of in (last, moved)])
        between = {name: _of_gram(gram) for (name, _), gram in zip(both, grams)}
        columns = ("raw", "preconditioned")
        for name, _ in named:
            row = {column: within.get(column, {}).get(name, math.nan) for column in columns}
            row["between_steps"] = between.get(name, math.nan)
            self.by_parameter.append({"step": self.step, "parameter": name, **row})
        row = {}
        for column in columns:
            row[column] = within.get(column, {}).get("", math.nan)
            row[f"{column}_shared"] = within.get(column, {}).get("shared", math.nan)
        row["between_steps"] = _of_gram(grams.sum(0))
        seconds, self._seconds = self._seconds + time.perf_counter() - started, 0.0
        self.records.append({"step": self.step, **row, "seconds": seconds})


def _gradients(loss: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of each parameter, dense; None where the loss does not reach it. The graph is retained."""
    places = [i for i, param in enumerate(params) if param.requires_grad and not is_lazy(param)]
    result: list[Tensor | None] = [None] * len(params)
    if loss.requires_grad and places:
        grads = torch.autograd.grad(loss, [params[i] for i in places], retain_graph=True, allow_unused=True)
        for i, grad in zip(places, grads):
            result[i] = grad if grad is None or grad.layout is torch.strided else grad.to_dense()
    return result


def _weights(groups: Sequence[dict[str, Any]]) -> Tensor:
    """The weight of each parameter's update, [P]: its learning rate over the largest; 1 where all are 0 (a warm-up's start)."""
    rates = torch.tensor([float(group["lr"]) for group in groups], dtype=torch.float64)
    largest = rates.max() if len(rates) else 0
    return rates / largest if largest > 0 else torch.ones_like(rates)


def _as_real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


@torch.no_grad()
def _grams(vectors: Sequence[Gradients]) -> Tensor:
    """Inner products of n vectors, each of P pieces, piece by piece: [P, n, n], float64 on the CPU.

    Each vector is first divided by its largest entry: neither a gradient of 1e-30 nor one of 1e200 underflows or overflows
    when it is squared.
    """
    scales = [_largest(vector) for vector in vectors]
    result = torch.zeros(len(vectors[0]) if vectors else 0, len(vectors), len(vectors), dtype=torch.float64)
    for gram, pieces in zip(result, zip(*vectors)):
        flat = [(i, _as_real(piece).reshape(-1)) for i, piece in enumerate(pieces) if piece is not None]
        for start in range(0, max((piece.numel() for _, piece in flat), default=0), CHUNK):
            rows = [_double(piece[start : start + CHUNK]) / scales[i] for i, piece in flat]
            stacked = torch.stack(rows)
            places = torch.tensor([i for i, _ in flat])
            gram[places[:, None], places] += (stacked @ stacked.T).cpu()
    return result


def _double(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()


def _largest(vector: Gradients) -> float:
    """The largest magnitude in a vector; 1 for a vector of zeros or one that is not finite."""
    pieces = [_as_real(piece) for piece in vector if piece is not None and piece.numel()]
    largest = max((float(piece.abs().amax()) for piece in pieces), default=0.0)
    return largest if 0 < largest < math.inf else 1.0


def _of_gram(gram: Tensor) -> float:
    """The alignment A of n vectors from their inner products [n, n]; NaN where a vector has no direction."""
    norms = gram.diagonal().sqrt()  # [n]
    if not len(norms) or not ((norms > 0) & norms.isfinite()).all():
        return math.nan
    return min(1.0, max(-1.0, float(2 * (gram / norms / norms[:, None]).mean() - 1)))
