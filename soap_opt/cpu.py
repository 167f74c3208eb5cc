"""The C++ engine (csrc/cpu): the calls of its operators, and the tables and scratch that they take."""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
from torch import Tensor

from . import _ext
from .batch import Batch, Skipped
from .layout import Layout, outside_modes


def cpu_soap(batch: Batch, grad_scale: Tensor | None) -> Skipped:
    """:func:`soap_opt.single_tensor._single_tensor_soap` by the compiled operator. All state has one dtype; the parameters'
    options differ in lr and weight_decay at most."""
    layouts, o = tuple(batch.layouts), batch.options[0]
    if any(options is not o for options in batch.options):
        lr, weight_decay = batch.learning_rates(), [options.weight_decay for options in batch.options]
    else:
        lr, weight_decay = [float(o.lr)], [o.weight_decay]
    arguments = (
        batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs, batch.grams, batch.bases, batch.refresh_offsets,
        batch.state_steps, layout_table(layouts), scratch(layouts, batch.exp_avgs[0].dtype), grad_scale,
    )  # fmt: skip
    outcomes = _ext.compiled_part().step_(*arguments, lr, weight_decay, o.step_row())  # [P] int32
    if outcomes is None:  # a tensor or a mode needs the dispatcher
        outcomes = torch.ops.soap_opt.step_(*arguments, lr=lr, weight_decay=weight_decay, options=o.step_row())
    skipped = Skipped([], [])
    for i, outcome in enumerate(outcomes.tolist() if outcomes.any() else ()):
        if outcome < 0:
            skipped.steps.append(i)
        else:
            skipped.refreshes.extend([i] * outcome)
    return skipped


def cpu_first_grams(
    grads: list[Tensor], layouts: list[Layout], dtype: torch.dtype, grad_scale: Tensor | None, gram_beta: float
) -> tuple[list[list[Tensor]], list[float]]:
    """The Grams of first gradients, [d_i, d_i] of dtype for each mode of each gradient, and the gradients' squared norms. A
    gradient whose squared norm is not finite has meaningless Grams."""
    grams = [[torch.zeros(d, d, dtype=dtype, device=grad.device) for d in layout.sizes] for grad, layout in zip(grads, layouts)]
    kinds = tuple(layouts)
    squared_norms = torch.ops.soap_opt.gram_ema_(
        grads, [g for gram in grams for g in gram], layout_table(kinds), scratch(kinds, dtype), grad_scale, gram_beta
    )
    return grams, squared_norms.tolist()


@lru_cache(maxsize=64)
@outside_modes()
def layout_table(layouts: tuple[Layout, ...]) -> Tensor:
    """The layouts as the int64 table that csrc/cpu/layout.h decodes, [*] on the CPU; equal layouts stand there once."""
    distinct = {layout: place for place, layout in enumerate(dict.fromkeys(layouts))}
    codes = [code for layout in distinct for code in layout.encoded]
    return torch.tensor(
        [len(distinct), len(layouts), *(distinct[layout] for layout in layouts), *codes], dtype=torch.int64, device="cpu"
    )


class _Memory(threading.local):
    def __init__(self) -> None:  # once for each thread
        self.kept: dict[torch.dtype, Tensor] = {}


_memory = _Memory()


def scratch(layouts: tuple[Layout, ...], dtype: torch.dtype) -> Tensor:
    """The compiled CPU step's scratch: [*] of dtype, kept between steps and shared by all optimizers of a thread. Allocating it
    anew in every step would take as long in page faults as the elementwise work."""
    kept = _memory.kept
    needed = scratch_numel(layouts, dtype, torch.get_num_threads())
    if dtype not in kept or kept[dtype].numel() < needed:
        kept.pop(dtype, None)
        with outside_modes():
            kept[dtype] = torch.empty(needed, dtype=dtype, device="cpu")
    return kept[dtype]


def release_scratch() -> int:
    """Free the scratch that this thread keeps, and return its bytes."""
    freed = sum(kept.numel() * kept.element_size() for kept in _memory.kept.values())
    _memory.kept.clear()
    return freed


@lru_cache(maxsize=64)
@outside_modes()
def scratch_numel(layouts: tuple[Layout, ...], dtype: torch.dtype, threads: int) -> int:
    """Elements of :func:`scratch`; :class:`soap_opt.diagnostics.MemoryReport` lists its parts."""
    numel: int = torch.ops.soap_opt.scratch_numel(layout_table(layouts), threads, dtype)
    return numel
