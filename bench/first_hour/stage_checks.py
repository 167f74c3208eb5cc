"""Each launch of fused steps alone, against torch in float64: what it reads is taken as it lies in memory before it.

What a launch should write follows from its rows of the tables (kernels/README.md) and from the memory that they point to, so
that an error shows in the launch that made it and not in those after it. The tables are those of real steps.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import soap_opt
from soap_opt.cuda import columns, tables
from soap_opt.cuda import launch as launching
from soap_opt.cuda import plan as plans

from ..fake_driver import watched
from ..results import Row, significant
from .common import synchronize

SHAPES = [(192, 128), (128, 64, 5, 5), (64, 32, 3, 3), (33, 17), (130, 1, 7), (300, 200), (65,), (4, 4), ()]
TINY = [(20, 12), (6, 5, 3, 3), (17, 3), (5,)]


class _Memory:
    """What numba's and CuPy's arrays have, so that torch sees a piece of the device's memory as a tensor."""

    def __init__(self, pointer: int, numel: int, kind: str) -> None:
        self.__cuda_array_interface__ = {"shape": (numel,), "typestr": kind, "data": (pointer, False), "version": 3}


def memory(device: torch.device, pointer: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[numel] the memory behind a pointer of the tables, as it is now and will be."""
    if device.type == "cpu":
        size = torch.empty((), dtype=dtype).element_size()
        return torch.frombuffer((ctypes.c_char * (numel * size)).from_address(pointer), dtype=dtype, count=numel)
    kind = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<i2"}[dtype]  # numpy's words know no bfloat16
    return torch.as_tensor(_Memory(pointer, numel, kind), device=device).view(dtype)


class Expected(NamedTuple):
    """What a row of a launch writes: ``where`` holds ``want`` afterwards."""

    what: str
    where: Tensor
    want: Tensor


class Launch:
    """One launch of a step before it runs.

    Args:
        plan: the step's.
        each: of the plan's launches.
    """

    def __init__(self, plan: plans.Plan, each: tables.Launch) -> None:
        self.kernel, self.device = each.kernel, plan.scalars.device
        self.grad_dtype = getattr(torch, each.grad_dtype)
        self.tiles = plan.tiles[each.first : each.first + each.count].cpu().numpy()
        self.problems = plan.problems.tensor.cpu().numpy()
        self.scalars, self.options = plan.scalars.double().cpu(), plan.options.tensor.double().cpu()

    def expected(self) -> Iterator[Expected]:
        """Of every row, with what lies in memory now."""
        kinds = dict(zip(self.tiles[:, 0].tolist(), self.tiles[:, 1].tolist()))
        for place, kind in kinds.items():
            row = self.problems[place]
            if kind == columns.KRONECKER:
                yield self.kronecker(row)
            elif kind == columns.COPY:
                numel = int(row[columns.NUMEL])
                yield Expected("copy", self.at(row, columns.Y, numel), self.at(row, columns.X, numel, self.grad_dtype).double())
            elif kind in (columns.ADAM_GRAD, columns.ADAM_SCRATCH):
                yield from self.elementwise(row, kind)
            elif kind == columns.APPLY:
                yield self.applied(row, self.at(row, columns.X, int(row[columns.NUMEL])).double())
            elif kind < columns.NORM and self.kernel == "gram_ema":
                yield from self.grams(row)
            elif kind < columns.NORM:
                yield from self.product(row)

    def at(self, row: np.ndarray, column: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return memory(self.device, int(row[column]), numel, dtype)

    def view(self, row: np.ndarray) -> Tensor:
        """[A, D, B] what the row multiplies, in float64."""
        depth, inner, count = (int(row[column]) for column in (columns.DEPTH, columns.INNER, columns.COLUMNS))
        from_grad = self.kernel in ("project_first", "gram_ema")
        x = self.at(row, columns.X, depth * count, self.grad_dtype if from_grad else torch.float32)
        return x.double().view(count // inner, depth, inner)

    def scalar(self, row: np.ndarray, column: int) -> float:
        return float(self.scalars[row[columns.INDEX], column])

    def option(self, row: np.ndarray, column: int) -> float:
        return float(self.options[row[columns.GROUP], column])

    def product(self, row: np.ndarray) -> Iterator[Expected]:
        depth = int(row[columns.DEPTH])
        x, q = self.view(row), self.at(row, columns.MATRIX, depth * depth).double().view(depth, depth)
        y = torch.einsum("aib,ij->ajb", x, q.T if self.kernel in ("back", "project_apply") else q).flatten()
        if self.kernel == "project_adam":
            yield from self.adam(row, y)
        elif self.kernel == "project_apply":
            yield self.applied(row, y)
        else:
            yield Expected("product", self.at(row, columns.Y, y.numel()), y)

    def adam(self, row: np.ndarray, projected: Tensor) -> Iterator[Expected]:
        numel = projected.numel()
        g = projected * self.scalar(row, columns.FACTOR)
        m, v = (self.at(row, column, numel) for column in (columns.EXP_AVG, columns.EXP_AVG_SQ))
        new_m = m.double() + self.option(row, columns.REST1) * (g - m)
        new_v = self.option(row, columns.BETA2) * v.double() + self.option(row, columns.REST2) * g.square()
        yield Expected("exp_avg", m, new_m)
        yield Expected("exp_avg_sq", v, new_v)
        yield Expected("update", self.at(row, columns.Y, numel), new_m / (new_v.sqrt() + self.option(row, columns.EPS)))

    def elementwise(self, row: np.ndarray, kind: int) -> Iterator[Expected]:
        x = self.at(row, columns.X, int(row[columns.NUMEL]), self.grad_dtype if kind == columns.ADAM_GRAD else torch.float32)
        m, v, update = self.adam(row, x.double())
        yield from (m, v)
        if kind == columns.ADAM_SCRATCH or self.option(row, columns.NORMALIZE):
            yield update
        else:  # (applied at once)
            yield self.applied(row, update.want)

    def applied(self, row: np.ndarray, update: Tensor) -> Expected:
        dtype = getattr(torch, columns.DTYPES[row[columns.PARAM_DTYPE]])
        p = self.at(row, columns.PARAM, update.numel(), dtype)
        scale = self.scalar(row, columns.STEP_SIZE) * self.scalar(row, columns.RESCALE)
        return Expected("parameter", p, (p.double() - update * scale) * self.scalar(row, columns.DECAY))

    def factors(self, row: np.ndarray, count: int) -> list[Tensor]:
        """[d, d] each: the bases of a Kronecker product, a row's Grams."""
        sizes = [int(row[columns.FACTORS + 2 * i + 1]) for i in range(count)]
        return [self.at(row, columns.FACTORS + 2 * i, d * d).view(d, d) for i, d in enumerate(sizes)]

    def kronecker(self, row: np.ndarray) -> Expected:
        depth, product = int(row[columns.DEPTH]), torch.ones(1, 1, dtype=torch.float64, device=self.device)
        for q in self.factors(row, int(row[columns.FACTOR_COUNT])):
            product = torch.kron(product, q.double())
        return Expected("kronecker", self.at(row, columns.Y, depth * depth), product.flatten())

    def grams(self, row: np.ndarray) -> Iterator[Expected]:
        x, grams = self.view(row), self.factors(row, int(row[columns.FACTOR_COUNT]))
        outer = torch.einsum("aib,ajb->ij", x, x) * self.scalar(row, columns.FACTOR) ** 2
        sizes = [len(gram) for gram in grams]
        for place, gram in enumerate(grams):
            before, d, after = math.prod(sizes[:place]), sizes[place], math.prod(sizes[place + 1 :])
            trace = torch.einsum("aibajb->ij", outer.view(before, d, after, before, d, after))
            yield Expected("gram", gram.flatten(), gram.double().lerp(trace, self.option(row, columns.SHAMPOO_REST)).flatten())


class Watch:
    """Around every launch of a step: the worst errors of what it left, by kernel and by what is written."""

    def __init__(self, device: str) -> None:
        self.device, self.errors = device, {}
        self.launches: dict[int, tuple[plans.Plan, tables.Launch]] = {}  # by the address of their tiles
        self._calls_of = plans.calls_of

    def calls_of(self, plan: plans.Plan, precision: str) -> list[plans.Call]:
        """In place of plan.calls_of: notes whose launch is whose."""
        calls = self._calls_of(plan, precision)
        for each, call in zip(plan.tables.launches, calls):
            self.launches[call.before[0].data_ptr()] = plan, each
        return calls

    def around(self, launch: Callable[[], None], kernel: Any, arguments: Sequence[Any], constants: dict[str, Any]) -> None:
        """The launch, and a comparison of what it left with what it should have."""
        known = self.launches.get(arguments[0].data_ptr())  # by its tiles
        if known is None:  # of a refresh
            launch()
            return
        plan, each = known
        name = f"{each.kernel} {each.grad_dtype}"
        synchronize(self.device)
        expected = list(Launch(plan, each).expected())
        launch()
        synchronize(self.device)
        for what, where, want in expected:
            error = float((where.double() - want).norm() / want.norm().clamp_min(1e-300))
            self.note(name, what, error)
        if each.kernel == "project_first":
            unusable = plan.scalars[:, columns.USABLE] != 1
            self.note(name, "unusable gradients", float(unusable.sum()))

    def note(self, kernel: str, what: str, error: float) -> None:
        worst = self.errors.get((kernel, what), 0.0)
        self.errors[kernel, what] = error if error != error or error > worst else worst  # (NaN stays)


def check(device: str, quick: bool, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[Row]:
    """The worst relative error of everything that the launches of three steps wrote, kernel by kernel."""
    generator = torch.Generator().manual_seed(0)
    shapes = TINY if quick else SHAPES
    params = [torch.nn.Parameter((0.1 * torch.randn(s, generator=generator)).to(device, dtype)) for s in shapes]
    optimizer = soap_opt.SOAP(params, fused=True, **options)
    watch = Watch(device)
    with (
        mock.patch.object(plans, "calls_of", watch.calls_of),
        mock.patch.object(launching, "kernel_for", watched(watch.around)),
    ):
        for _ in range(4):  # the first makes the bases alone
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
            optimizer.step()
    if not watch.errors:
        raise RuntimeError("no launch went through launch.kernel_for: was it renamed?")
    return [{"kernel": kernel, "what": what, "error": significant(e, 2)} for (kernel, what), e in watch.errors.items()]
