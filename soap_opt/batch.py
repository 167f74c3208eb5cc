"""The parameters that one call steps, and what became of them."""

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
    collector busy for a third of a step of 2,000 small ones.

    The lists of matrices run over the preconditioned modes, parameter after parameter; d_i are the sizes of a parameter's,
    ``layouts[p].sizes``.

    Attributes:
        params: [*shape], updated in place.
        grads: the same shapes, of any floating dtype; never written.
        exp_avgs, exp_avg_sqs: m and v in the eigenbasis, [*shape], float32 (float64 for float64).
        grams, bases: G_i and Q_i, [d_i, d_i].
        refresh_offsets: of each mode, 0-d int64 on the CPU.
        state_steps: t, 0-d float32.
        layouts: how each parameter's modes lie.
        options: of each parameter its param group's; the same object for a whole group, whose parameters are neighbours.
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
        """One of the lists of matrices as one list for each parameter."""
        rest = iter(matrices)
        return [list(itertools.islice(rest, len(layout.modes))) for layout in self.layouts]

    def select(self, indices: Sequence[int]) -> Batch:
        """Some of the parameters, in this order."""
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
        """The param groups' options, each with its parameters."""
        ends = itertools.groupby(range(len(self)), key=lambda i: id(self.options[i]))
        return [(self.options[own[0]], own) for own in (list(indices) for _, indices in ends)]

    def learning_rates(self) -> list[float]:
        """Of each parameter; a Tensor is read once a group."""
        rates = {id(options): float(options.lr) for options, _ in self.groups()}
        return [rates[id(options)] for options in self.options]

    def with_options(self, **changes: Any) -> Batch:
        """The same parameters, with other values of some options."""
        changed = {id(options): replace(options, **changes) for options, _ in self.groups()}  # one a group, not one a parameter
        return replace(self, options=[changed[id(options)] for options in self.options])


class Skipped(NamedTuple):
    """Parameters of a batch of which a step left something as it was."""

    steps: list[int]  # those whose gradient is not usable (gradients.is_usable): nothing of them changed
    refreshes: list[int]  # those with a basis that could not be refreshed: it, m and v stay; once for each

    def extend(self, other: Skipped, places: Sequence[int]) -> None:
        """Add what was left of some of the parameters. places: of these in the list of all."""
        for own, more in zip(self, other):
            own.extend(places[i] for i in more)
