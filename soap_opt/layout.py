"""The layout of a parameter, derived from its shape, its strides and the options that shape its state.

Nothing here is state. A layout may be thrown away at any time and is made again from the parameter and ``optimizer.state``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# Tiny neighbouring modes (the 5 x 5 of a convolution) are multiplied as one Kronecker product: one gemm of width 25 runs
# at 73 GF/s, and two batched products of width 5 are bound by memory. Wider factors are quicker on their own.
KRONECKER_MAX_FACTOR = 8
KRONECKER_MAX_WIDTH = 64


class ModeGroup(NamedTuple):
    """Neighbouring dimensions, in memory order, that one matrix multiplies."""

    width: int  # product of the sizes
    modes: tuple[int, ...]  # preconditioned modes of the merged view, in memory order; () = not preconditioned
    sizes: tuple[int, ...]  # their sizes


@dataclass(frozen=True, eq=False)  # layout_of makes equal layouts once: identity compares and hashes them quickly
class Layout:
    """The view that the mode products have of a parameter of shape ``shape``.

    Attributes:
        shape: the parameter's own shape (d_1, ..., d_k).
        view_order: permutation of the parameter's dimensions under which ``view_shape`` is a reshape.
        view_shape: the *merged view*; its dimensions are the modes that ``gram_i`` and ``basis_i`` count.
        modes: the preconditioned modes i of the merged view, ascending.
        sizes: their sizes d_i.
        memory_order: permutation of the parameter's dimensions that the groups follow (outermost in memory first).
        mode_groups: neighbouring dimensions that are multiplied together.
    """

    shape: tuple[int, ...]
    view_order: tuple[int, ...]
    view_shape: tuple[int, ...]
    modes: tuple[int, ...]
    sizes: tuple[int, ...]
    memory_order: tuple[int, ...]
    mode_groups: tuple[ModeGroup, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def _memory_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.memory_order)

    @cached_property
    def _memory_inverse(self) -> tuple[int, ...]:
        return _inverse(self.memory_order)

    @cached_property
    def memory_strides(self) -> tuple[int, ...]:
        """Strides of a tensor of this shape that lies in memory order, without gaps."""
        strides, stride = [0] * len(self.shape), 1
        for dim in reversed(self.memory_order):
            strides[dim] = stride
            stride *= max(1, self.shape[dim])
        return tuple(strides)

    @cached_property
    def _view_inverse(self) -> tuple[int, ...]:
        return _inverse(self.view_order)

    # Keys of the state, one for each of ``modes`` (made once: formatting them in a step would take a microsecond each time)
    @cached_property
    def gram_keys(self) -> tuple[str, ...]:
        return tuple(f"gram_{mode}" for mode in self.modes)

    @cached_property
    def basis_keys(self) -> tuple[str, ...]:
        return tuple(f"basis_{mode}" for mode in self.modes)

    @cached_property
    def offset_keys(self) -> tuple[str, ...]:
        return tuple(f"refresh_offset_{mode}" for mode in self.modes)

    def arrange(self, x: Tensor) -> Tensor:
        """[*batch, *shape] -> [*batch, *group widths], dimensions in memory order; a view unless x has other strides."""
        batch = x.dim() - len(self.shape)
        x = x.permute([*range(batch), *(batch + i for i in self.memory_order)])
        return x.reshape([*x.shape[:batch], *(group.width for group in self.mode_groups)])

    def restore(self, x: Tensor, batch: int = 0) -> Tensor:
        """The inverse of :meth:`arrange`; x may have any shape of the right size after its ``batch`` dimensions."""
        x = x.reshape([*x.shape[:batch], *self._memory_shape])
        return x.permute([*range(batch), *(batch + i for i in self._memory_inverse)])

    @cached_property
    def encoded(self) -> tuple[int, ...]:
        """The layout as integers of :func:`soap_opt.cpu.layout_table`: ndim, order.., numel, number of groups; for each group
        its width, number of modes, positions.., sizes.."""
        code = [len(self.memory_order), *self.memory_order, self.numel, len(self.mode_groups)]
        for group in self.mode_groups:
            code += [group.width, len(group.modes), *(self.modes.index(mode) for mode in group.modes), *group.sizes]
        return tuple(code)

    def merged(self, x: Tensor) -> Tensor:
        """[*shape] -> [*view_shape]."""
        return x.permute(self.view_order).reshape(self.view_shape)

    def unmerged(self, x: Tensor) -> Tensor:
        """[*view_shape] -> [*shape]."""
        return x.reshape([self.shape[i] for i in self.view_order]).permute(self._view_inverse)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    inverse = [0] * len(order)
    for position, dim in enumerate(order):
        inverse[dim] = position
    return tuple(inverse)


def merge(shape: Iterable[int], max_precond_dim: int) -> tuple[int, ...]:
    """Merge neighbouring sizes greedily, left to right, while the product stays <= max_precond_dim; drop sizes of 1.

    >>> merge((2, 3, 4, 5), 6)
    (6, 4, 5)
    """
    merged: list[int] = []
    current = 1
    for size in shape:
        if current * size <= max_precond_dim:
            current *= size
        else:
            # a size beyond the limit stands alone as soon as the next one does not fit beside it, as in the original
            if current > 1:
                merged.append(current)
                current = size
            else:
                merged.append(size)
                current = 1
    if current > 1 or not merged:
        merged.append(current)
    return tuple(merged)


def memory_order(x: Tensor) -> tuple[int, ...]:
    """Dimensions of a dense x from the outermost in memory to the innermost; the identity for an x that is not dense."""
    identity = tuple(range(x.dim()))
    if x.is_contiguous():
        return identity
    strides = x.stride()
    order = tuple(sorted(identity, key=lambda i: (-strides[i], i)))
    return order if x.permute(order).is_contiguous() else identity


@lru_cache(maxsize=4096)
def layout_of(
    shape: tuple[int, ...],
    order: tuple[int, ...],
    *,
    max_precond_dim: int,
    merge_dims: bool,
    precondition_1d: bool,
    data_format: str,
) -> Layout:
    """The layout of a parameter.

    Args:
        shape: the parameter's shape.
        order: the :func:`memory_order` of its ``exp_avg``, which the hot loop reads.
        max_precond_dim, merge_dims, precondition_1d, data_format: as in :class:`soap_opt.SOAP`.
    """
    identity = tuple(range(len(shape)))
    numel = math.prod(shape)
    view_order, view_shape = identity, shape
    if merge_dims and numel > 0:
        # data_format says in which order the dimensions are read; it only matters for which dimensions are neighbours
        if data_format == "channels_last" and len(shape) == 4:
            view_order = (0, 3, 1, 2)
        view_shape = merge((shape[i] for i in view_order), max_precond_dim)
        # the groups follow the merged view; where memory disagrees (channels_last strides), arrange() copies
        order = view_order

    # A 0-D or 1-D parameter counts as such before any merging: a (n, 1) weight that merges to one dimension is a matrix.
    eligible = numel > 0 and (len(shape) > 1 or (len(shape) == 1 and precondition_1d))
    modes = tuple(i for i, size in enumerate(view_shape) if eligible and 1 < size <= max_precond_dim)

    # Sizes in the order of memory, each with its mode number or None
    in_memory = range(len(view_shape)) if view_shape is not shape else order
    groups: list[ModeGroup] = []
    for i in in_memory:
        size = view_shape[i]
        if size == 1:
            continue
        last = groups[-1] if groups else None
        if i not in modes:
            if last is not None and not last.modes:
                groups[-1] = ModeGroup(last.width * size, (), ())
            else:
                groups.append(ModeGroup(size, (), ()))
        elif last is not None and last.modes and _worth_kronecker(last, size, numel):
            groups[-1] = ModeGroup(last.width * size, (*last.modes, i), (*last.sizes, size))
        else:
            groups.append(ModeGroup(size, (i,), (size,)))
    return Layout(shape, view_order, view_shape, modes, tuple(view_shape[i] for i in modes), order, tuple(groups))


def _worth_kronecker(group: ModeGroup, size: int, numel: int) -> bool:
    width = group.width * size
    # with fewer than `width` columns, making the Kronecker product costs more than using it saves
    return max(*group.sizes, size) <= KRONECKER_MAX_FACTOR and width <= KRONECKER_MAX_WIDTH and numel >= width * width


@contextmanager
def outside_modes() -> Iterator[None]:
    """No FakeTensorMode and no inference mode inside. Tensors in caches that all optimizers share must not be made under such a
    mode: a cached fake tensor would make every real optimizer with the same layouts fail."""
    with _disable_current_modes(), torch.inference_mode(False):
        yield
