"""The parameters that one call steps, and which of them it skipped."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from .layout import Layout
from .options import Options


@dataclass
class Batch:
    """Parameters with a gradient and a basis, as parallel lists: an object for each parameter would keep Python's garbage
    collector busy for a third of a step of 2,000 small parameters.

    Lists of matrices run over the preconditioned modes, parameter after parameter. d_i are the sizes of a parameter's
    preconditioned modes, ``layouts[p].sizes``.

    Attributes:
        params: [*shape], updated in place.
        grads: the same shapes, of any floating dtype; never written.
        exp_avgs, exp_avg_sqs: m and v in the eigenbasis, [*shape], float32 (float64 for float64).
        grams, bases: G_i and Q_i, [d_i, d_i].
        refresh_offsets: one for each mode, 0-d int64 on the CPU.
        state_steps: t, 0-d float32.
        layouts: the layout of each parameter.
        options: the options of each parameter's group: one object for a whole group, whose parameters are neighbours.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    grams: list[Tensor]
    bases: list[Tensor]
    refresh_offsets: list[Tensor]
    state_steps: list[Tensor]
    layouts: list[Layout]
    options: list[Options]

    def __len__(self) -> int:
        return len(self.params)

    def by_parameter(self, matrices: list[Tensor]) -> list[list[Tensor]]:
        """A list of matrices, split into one list for each parameter."""
        rest = iter(matrices)
        return [list(itertools.islice(rest, len(layout.modes))) for layout in self.layouts]

    def select(self, indices: Sequence[int]) -> Batch:
        """The batch of the parameters at these indices, in this order."""
        if len(indices) == len(self) and all(map(operator.eq, indices, range(len(self)))):
            return self

        def of_parameters(column: list[Any]) -> list[Any]:
            return [column[i] for i in indices]

        def of_modes(column: list[Tensor]) -> list[Tensor]:
            matrices = self.by_parameter(column)
            return [matrix for i in indices for matrix in matrices[i]]

        return Batch(
            of_parameters(self.params), of_parameters(self.grads), of_parameters(self.exp_avgs),
            of_parameters(self.exp_avg_sqs), of_modes(self.grams), of_modes(self.bases), of_modes(self.refresh_offsets),
            of_parameters(self.state_steps), of_parameters(self.layouts), of_parameters(self.options),
        )  # fmt: skip

    def groups(self) -> list[tuple[Options, list[int]]]:
        """The options of each param group, with the indices of its parameters."""
        ends = itertools.groupby(range(len(self)), key=lambda i: id(self.options[i]))
        return [(self.options[own[0]], own) for own in (list(indices) for _, indices in ends)]

    def learning_rates(self) -> list[float]:
        """The learning rate of each parameter; a Tensor is read once for each group."""
        rates = {id(options): float(options.lr) for options, _ in self.groups()}
        return [rates[id(options)] for options in self.options]

    def with_options(self, **changes: Any) -> Batch:
        """The same parameters, with other values of some options."""
        changed = {id(options): replace(options, **changes) for options, _ in self.groups()}  # one object a group
        return replace(self, options=[changed[id(options)] for options in self.options])


class Skipped(NamedTuple):
    """Indices of the parameters in a batch for which a step skipped the update, or the refresh of a basis."""

    steps: list[int]  # parameters whose gradient is not usable (gradients.is_usable): they and their state did not change
    refreshes: list[int]  # parameters with a basis that could not be refreshed, which stays with m and v; one entry a basis

    def extend(self, other: Skipped, places: Sequence[int]) -> None:
        """Add the indices of a part of the batch. places: the indices of that part's parameters in the batch."""
        for own, more in zip(self, other):
            own.extend(places[i] for i in more)
