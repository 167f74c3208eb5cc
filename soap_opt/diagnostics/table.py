"""A table of plain values, to be printed or written as CSV; and the names of parameters in such tables."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


class Table(list[dict[str, Any]]):
    """A list of rows, each a dict from column to a str, an int or a float; ``print(table)`` shows it."""

    @property
    def columns(self) -> list[str]:
        """The columns of all rows, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self for name in row))

    def column(self, name: str) -> list[Any]:
        """The values of one column, row by row; None where a row lacks it."""
        return [row.get(name) for row in self]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write header and rows. NaN is written as nan, infinity as inf."""
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self)

    def __str__(self) -> str:
        columns = self.columns
        cells = [columns, *([_cell(row.get(name, "")) for name in columns] for row in self)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        numbers = [all(not isinstance(row.get(name), str) for row in self) for name in columns]
        lines = [
            "  ".join(cell.rjust(width) if number else cell.ljust(width) for cell, width, number in zip(row, widths, numbers))
            for row in cells
        ]
        return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def named_parameters(
    groups: list[dict[str, Any]], model: nn.Module | None = None
) -> Iterator[tuple[str, dict[str, Any], Tensor]]:
    """(name, group, parameter) over all param groups of an optimizer, in order; no name comes twice.

    A parameter's name is its name in the model, else its name in the optimizer's param groups, else its number over all groups.
    """
    model_names = {id(param): name for name, param in model.named_parameters()} if model is not None else {}
    seen: set[str] = set()
    index = 0
    for group in groups:
        for place, param in enumerate(group["params"]):
            own = group["param_names"][place] if "param_names" in group else str(index)
            name = model_names.get(id(param), own)
            if name in seen:  # groups may share names: an encoder's and a decoder's
                name = f"{name} ({index})"
            seen.add(name)
            index += 1
            yield name, group, param


def check_model(model: Any) -> None:
    """Raise TypeError unless ``model`` is a module or None."""
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")


def check_optimizer(optimizer: Any) -> None:
    """Raise TypeError unless ``optimizer`` is a torch optimizer."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; of a trainer's wrapper give the "
            "optimizer inside"
        )
