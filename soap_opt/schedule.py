"""WHEN a basis is refreshed. A unit is one preconditioned mode of one parameter.

- ``"together"``: every unit at t mod f == 0, as the original does: a spike every f steps.
- ``"staggered"``: unit i at (t + offset_i) mod f == 0; the offsets spread the refreshes' flops evenly over f steps.
- ``"adaptive"``: as staggered, but a due unit whose basis still diagonalises its Gram well enough is passed over.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

POLICIES = ("together", "staggered", "adaptive")


def is_due(step: int, offset: int, frequency: int, policy: str) -> bool:
    """Whether a unit is due at ``step`` (t, counted after this step's update)."""
    if policy == "together":
        offset = 0
    return step > 0 and (step + offset) % frequency == 0


def due_units(
    steps: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], frequency: int | npt.NDArray[np.int64], policy: str
) -> npt.NDArray[np.bool_]:
    """:func:`is_due` for many units: [n] bool of [n] int64."""
    moved = steps if policy == "together" else steps + offsets
    due: npt.NDArray[np.bool_] = (steps > 0) & (moved % frequency == 0)
    return due


def tolerance_of(policy: str, refresh_tolerance: float) -> float:
    """The tolerance for soap_opt::refresh_basis_: negative unless "adaptive", so that every due unit is refreshed."""
    return refresh_tolerance if policy == "adaptive" else -1.0


def unit_flops(numel: int, size: int) -> float:
    """Flops of refreshing one mode of size d of a parameter with ``numel`` elements, from shapes alone.

    P = G Q (2 d^3), the reflections for R and for Q (4/3 d^3 each), Q^T Q' (2 d^3), the product that turns m (2 d numel). A
    nominal count, so that the schedule does not depend on the implementation: the engine makes no Q^T Q' where d^2 > numel.
    """
    return (2 + 8 / 3 + 2) * size**3 + 2.0 * size * numel


def balanced_offsets(flops: Sequence[float], frequency: int, load: Mapping[int, float] | None = None) -> list[int]:
    """An offset in [0, frequency) for every unit: costly units first, every unit into the phase with the least flops.

    Args:
        flops: cost of each unit.
        frequency: number of phases.
        load: flops of units placed earlier, by phase; a phase that is not named is empty.
    """
    load = dict(load or {})
    heap = [(cost, phase) for phase, cost in load.items()]
    heapq.heapify(heap)
    # Empty phases are counted, not listed: a frequency of a billion ("never") must not make a list of a billion.
    empty = (phase for phase in range(frequency) if phase not in load)
    offsets = [0] * len(flops)
    for i in sorted(range(len(flops)), key=lambda i: (-flops[i], i)):
        phase = next(empty, None)
        cost = 0.0
        if phase is None:
            cost, phase = heapq.heappop(heap)
        offsets[i] = phase
        heapq.heappush(heap, (cost + flops[i], phase))
    return offsets


def start_of(place: int, frequency: int) -> int:
    """The phase in which the balancing begins for optimizer number ``place`` of several. The phases follow the multiples of the
    golden ratio, so that any regular part of the optimizers (the same layer of every block, say) is spread evenly."""
    return int(frequency * (place * 0.6180339887498949 % 1))


def complete_offsets(
    flops: Sequence[float], known: Sequence[int | None], frequency: int, starts: Sequence[int] | None = None
) -> list[int]:
    """Offsets of all units with this frequency, of which some are in the state already.

    Balanced over the whole list, so that a run that is resumed before some parameter saw its first gradient gives it the same
    offset as the run that was not interrupted. Where the state comes from another list (a group was added later, the frequency
    changed), the units without an offset take the phases with the least flops.

    Args:
        flops: cost of each unit.
        known: each unit's offset in the state, or None.
        frequency: number of phases.
        starts: for each unit the ``refresh_start`` of its group; None for 0 everywhere.
    """
    balanced = balanced_offsets(flops, frequency)
    if starts is not None:
        balanced = [(offset + start_of(start, frequency)) % frequency for offset, start in zip(balanced, starts)]
    if any(old not in (None, new) for old, new in zip(known, balanced)):
        load: dict[int, float] = {}
        for cost, old in zip(flops, known):
            if old is not None:
                load[old % frequency] = load.get(old % frequency, 0.0) + cost
        late = [i for i, old in enumerate(known) if old is None]
        for i, offset in zip(late, balanced_offsets([flops[i] for i in late], frequency, load)):
            balanced[i] = offset
    return [new if old is None else old for old, new in zip(known, balanced)]
