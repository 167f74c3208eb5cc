"""The memory that an optimizer holds, or will hold."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..cpu import scratch_numel
from ..cuda.plan import pieces_of, scratch_bytes
from ..cuda.refresh import kept_bytes
from ..functional import Path, path_of
from ..gradients import state_dtype
from ..layout import Layout, layout_of, memory_order
from ..options import REFUSED, SHAPING, Options
from ..schedule import complete_offsets, unit_flops
from ..soap import SOAP
from ..state import refresh_offsets
from .table import named_parameters

# One core refreshes a basis of up to this size (csrc/cpu/refresh_basis.h, kThreadedSize). Larger ones have room for each thread
# (csrc/cpu/wide.h, wide_room, which is more than csrc/cpu/householder.cpp's).
THREADED_SIZE = 512

KINDS = ("exp_avg", "exp_avg_sq", "gram", "basis", "other")


@dataclass
class MemoryReport:
    """Bytes of optimizer state; ``print(report)`` shows the table.

    Attributes:
        by_parameter: for each parameter (its name, or its index over all groups) the bytes of each kind in ``KINDS``.
        shapes: the parameters' shapes.
        scratch: bytes of scratch besides the state; 0 for the implementations in PyTorch. The compiled CPU step keeps its
            scratch between steps, and all optimizers of a thread share it. It has for each core three times the largest
            parameter that one core steps, and packed matrices and tiles for the parameter's modes: 2 D^2 elements for each mode
            of up to 512, and for the widest 784 D and 0.8 MiB, or 2 D^2 + 640 D where that is more and D at most 512
            (``scratch`` of (10000, 2) is 30 MiB a core). The fused CUDA step has 8 bytes for each element, but no more than
            scratch_limit; for the refreshes of each group's largest phase 4 d^2 + 8 d bytes for each basis, and with
            overlap_refresh 8 for each element of the phase's parameters; with capturable, for each graph, as much again with
            all bases.
        skipped_steps, skipped_refreshes: of an optimizer, how often a gradient was not usable, and how often a basis could not
            be refreshed.
        refresh: bytes that the refresh of the largest basis takes for its time, at most: 8 d^2 elements; on the CPU for each
            core where d <= 512, else 272 d + 143616 more for each core.
    """

    by_parameter: dict[str, dict[str, int]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    scratch: int = 0
    refresh: int = 0
    skipped_steps: int = 0
    skipped_refreshes: int = 0

    @property
    def by_kind(self) -> dict[str, int]:
        """Bytes of each kind over all parameters; "other" is step, initialized and the refresh offsets."""
        return {kind: sum(row[kind] for row in self.by_parameter.values()) for kind in KINDS}

    @property
    def total(self) -> int:
        """Bytes of all state, without the scratch."""
        return sum(self.by_kind.values())

    def __str__(self) -> str:
        width = max([len("parameter"), *map(len, self.by_parameter)])
        shape_width = max([len("shape"), *(len(str(shape)) for shape in self.shapes.values())])
        header = f"{'parameter':{width}}  {'shape':{shape_width}}" + "".join(f"{kind:>12}" for kind in (*KINDS, "total"))
        lines = [header, "-" * len(header)]
        rows = sorted(self.by_parameter.items(), key=lambda item: -sum(item[1].values()))
        for name, row in [*rows, ("total", self.by_kind)]:
            shape = str(self.shapes.get(name, "")) if row is not self.by_kind else ""
            values = [*(row[kind] for kind in KINDS), sum(row.values())]
            lines.append(f"{name:{width}}  {shape:{shape_width}}" + "".join(f"{_human(value):>12}" for value in values))
        lines.insert(-1, "-" * len(header))
        if self.scratch:
            lines.append(f"and {_human(self.scratch)} of scratch")
        if self.refresh:
            lines.append(f"and up to {_human(self.refresh)} while the largest basis is refreshed")
        if self.skipped_steps or self.skipped_refreshes:
            lines.append(
                f"{self.skipped_steps} unusable gradients and {self.skipped_refreshes} failed refreshes were passed over"
            )
        return "\n".join(lines)


def _human(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def memory_report(
    model_or_optimizer: nn.Module | Optimizer | Iterable[Tensor] | Iterable[tuple[str, Tensor]], **options: Any
) -> MemoryReport:
    """Bytes of SOAP's state, by kind and by parameter, before training or during it.

    Args:
        model_or_optimizer: a module or parameters (the report is on the state that ``SOAP(model.parameters(), **options)`` will
            hold), or a SOAP optimizer (the report is on its state, or on the future state of parameters that have none yet).
        options: SOAP's keyword arguments, for a module or parameters; the options that shape the state matter.

    Raises:
        TypeError: options together with an optimizer, which has its own, or an option that SOAP does not have.
        ValueError: an option is out of its range.
    """
    if isinstance(model_or_optimizer, Optimizer):
        if not isinstance(model_or_optimizer, SOAP):
            raise TypeError(f"memory_report reports on soap_opt.SOAP, got {type(model_or_optimizer).__name__}")
        if options:
            raise TypeError(f"memory_report takes no options with an optimizer, got {', '.join(options)}")
        report = _report(model_or_optimizer.param_groups, model_or_optimizer.state, refresh_offsets(model_or_optimizer))
        report.skipped_steps = model_or_optimizer.skipped_steps()
        report.skipped_refreshes = model_or_optimizer.skipped_refreshes()
        return report
    signature = inspect.signature(SOAP).parameters
    defaults = {n: p.default for n, p in signature.items() if p.default is not inspect.Parameter.empty}
    options = {name: value for name, value in options.items() if name not in REFUSED or value}  # like SOAP, takes amsgrad=False
    unknown = [name for name in options if name not in defaults]
    if unknown:
        raise TypeError(f"SOAP has no option {', '.join(unknown)}")
    named: list[tuple[str, Tensor]]
    if isinstance(model_or_optimizer, nn.Module):
        named = [(name, p) for name, p in model_or_optimizer.named_parameters() if p.requires_grad]
    else:
        named = [p if isinstance(p, tuple) else (str(i), p) for i, p in enumerate(model_or_optimizer)]
    Options.of({**defaults, **options}).check()
    group = {**defaults, **options, "params": [p for _, p in named], "param_names": [name for name, _ in named]}
    return _report([group], {}, None)


def refresh_numel(size: int, device_type: str) -> int:
    """Elements that the refresh of a basis [size, size], and of those of its size beside it, takes for its time, at most."""
    whole = 8 * size * size
    if device_type != "cpu":
        return whole
    threads = torch.get_num_threads()
    return whole * threads if size <= THREADED_SIZE else whole + threads * (272 * size + 143_616)


def _report(groups: list[dict[str, Any]], states: Any, offsets: dict[Tensor, list[int]] | None) -> MemoryReport:
    """The report. offsets: the refresh offsets of each parameter's modes; None balances them over the one group."""
    report = MemoryReport()
    names = (name for name, _, _ in named_parameters(groups))
    scratch: dict[torch.dtype, int] = {}
    on_cuda: list[tuple[dict[str, Any], list[Layout]]] = []
    for group in groups:
        layouts: dict[torch.dtype, list[Layout]] = {}
        for param, name in zip(group["params"], names):  # (in this order: params end the loop before zip takes another name)
            report.shapes[name] = tuple(param.shape)
            report.by_parameter[name] = row = dict.fromkeys(KINDS, 0)
            layout = layout_of(tuple(param.shape), memory_order(param), **{name: group[name] for name in SHAPING})
            layouts.setdefault(state_dtype(param), []).append(layout)
            for size in layout.sizes:
                report.refresh = max(report.refresh, refresh_numel(size, param.device.type) * state_dtype(param).itemsize)
            state = states.get(param)
            if state:
                for key, value in state.items():
                    kind = key.rsplit("_", 1)[0] if key.startswith(("gram_", "basis_")) else key
                    row[kind if kind in KINDS else "other"] += value.numel() * value.element_size()
                continue
            itemsize = state_dtype(param).itemsize
            row["exp_avg"] = row["exp_avg_sq"] = param.numel() * itemsize
            row["gram"] = row["basis"] = sum(size * size for size in layout.sizes) * itemsize
            row["other"] = 4 + 1 + 8 * len(layout.modes)  # step, initialized, refresh offsets
        options = Options.of(group)
        paths = {path_of(param, options) for param in group["params"]}
        if paths == {Path.CPU}:
            for dtype, same_dtype in layouts.items():
                needed = scratch_numel(tuple(same_dtype), dtype, torch.get_num_threads()) * dtype.itemsize
                scratch[dtype] = max(scratch.get(dtype, 0), needed)
        if Path.CUDA in paths:
            on_cuda.append((group, layouts.get(torch.float32, [])))
    report.scratch = sum(scratch.values()) + _scratch_on_cuda(on_cuda, offsets)
    return report


def _scratch_on_cuda(groups: list[tuple[dict[str, Any], list[Layout]]], offsets: dict[Tensor, list[int]] | None) -> int:
    """Bytes that the fused CUDA step keeps besides the state. groups: each with the layouts of its float32 parameters."""
    together: dict[tuple[Any, ...], list[list[Layout]]] = {}  # by the values that groups must share for one call
    kept = 0
    for group, layouts in groups:
        options = Options.of(group)
        together.setdefault((options.scratch_limit, options.agree_on_cuda()), []).append(layouts)
        frequency, none = group["precondition_frequency"], [[0] * len(layout.modes) for layout in layouts]
        if group["refresh"] == "together":
            mode_offsets = none
        elif offsets is not None:
            mode_offsets = [offsets[p] for p in group["params"] if state_dtype(p) == torch.float32]
        else:
            flops = [unit_flops(layout.numel, size) for layout in layouts for size in layout.sizes]
            balanced = iter(complete_offsets(flops, [None] * len(flops), frequency))
            mode_offsets = [[next(balanced) for _ in layout.modes] for layout in layouts]
        kept += kept_bytes(layouts, mode_offsets, frequency, group["overlap_refresh"] and not group["capturable"])
        if group["capturable"]:
            kept += kept_bytes(layouts, none, 1, True)  # a graph has scratch of its own
    steps = [0]
    for (limit, _), layouts_by_group in together.items():
        whole = [layout for layouts in layouts_by_group for layout in layouts]
        one_call = len(pieces_of(tuple(whole), limit)) == 1
        steps += [scratch_bytes(layouts, limit) for layouts in ([whole] if one_call else layouts_by_group)]
    return max(steps) + kept
