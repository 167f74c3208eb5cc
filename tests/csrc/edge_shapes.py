"""The engine's edge shapes, stepped and compared with the specification. Not a test by itself: sanitize.py runs it."""

from __future__ import annotations

import ctypes
import itertools
import sys
import time
import warnings

import torch
from comparison import IMPLEMENTATIONS, SoapRun, random_gradients, random_params, run_lockstep

import soap_opt
from soap_opt import cpu
from soap_opt.refresh_operator import refresh_bases_

SIZES = [0, 1, 2, 3, 5, 15, 16, 17, 33, 64, 129, 513]


def shapes() -> list[tuple[int, ...]]:
    """Sizes at the edges of registers, panels, chunks and of the widest tile, in every position."""
    result: list[tuple[int, ...]] = [()]
    result += [(d,) for d in SIZES]
    result += [(a, b) for a, b in itertools.product(SIZES, SIZES) if a * b <= 40_000]
    result += [(513, 64), (64, 513)]
    result += [(17, 3, d) for d in SIZES[1:]] + [(d, 3, 17) for d in SIZES[1:]] + [(3, d, 17) for d in SIZES[1:]]
    result += [(2, d, 33) for d in (129, 513)] + [(0, 3, 5)]
    result += [(a, b, 5, 5) for a in (1, 3, 16, 33, 129) for b in (1, 2, 15, 17, 64)]
    result += [(a, b, 3, 3) for a in (5, 64) for b in (17, 33)] + [(5, 5, 17, 33), (3, 1, 129, 2), (129, 33, 1, 5)]
    result += [(2, 3, 5, 3, 2), (1, 17, 2, 1, 15), (3, 5, 33, 2, 2), (2, 2, 2, 2, 2, 2), (15, 16, 3, 5, 5)]
    return result


def exact_scratch(layouts, dtype):
    """Made anew and not an element larger than asked for, so that running over its end is seen."""
    return torch.empty(cpu.scratch_numel(layouts, dtype, torch.get_num_threads()), dtype=dtype)


def lockstep(some, *, steps=3, compare=True, order=None, dtype=torch.float32, **options):
    """compare: with the specification, too; refreshes are due at every step unless the options say otherwise."""
    options = {"lr": 0.01, "precondition_frequency": 1, **options}
    params, gradients = random_params(some, dtype=dtype), random_gradients(some, steps, dtype=dtype, rank_one=0.2)
    if order is not None:
        params = [order(p) for p in params]
        gradients = [[order(g) for g in row] for row in gradients]
    fused = SoapRun(params, **IMPLEMENTATIONS["fused"], **options)
    if compare:
        run_lockstep(SoapRun(params, **IMPLEMENTATIONS["single"], **options), fused, gradients, options)
    else:
        for row in gradients:
            fused.step(row)
        for p in fused.params:
            assert p.isfinite().all()


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.mT.contiguous().mT if x.dim() > 1 else x


def holes(x):
    return torch.cat([x, x], -1)[..., : x.shape[-1]] if x.dim() else x


BEGIN = time.monotonic()


def done(what):
    print(f"{time.monotonic() - BEGIN:6.1f} s  {what}", flush=True)


def check_every_shape():
    every = shapes()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        lockstep(every, compare=threads == 1, steps=4 - threads)
        done(f"{len(every)} shapes, {threads} threads")


def check_instruction_sets(small, limit):
    sets = ["default", "avx2", "avx512"]
    for level in (2, 1, 0):
        if level > sets.index(soap_opt._C.cpu_capability):  # (the tiles of AVX-512 run everywhere, see sanitize.py)
            done(f"NOT RUN: this processor has no {sets[level]}")
            continue
        limit.value = level
        lockstep(small[:: 1 if level < 2 else 3])
        lockstep(small[::3], dtype=torch.float64)
        done(f"instruction set {sets[level]}")
    limit.value = 2


def check_options(small):
    for refresh, normalize in (("together", False), ("staggered", True), ("adaptive", False)):
        lockstep(small[::2], refresh=refresh, normalize_grads=normalize, precondition_frequency=2, refresh_tolerance=0.1)
        done(f"refresh={refresh!r}")
    lockstep(small[::2], order=channels_last, precondition_frequency=2)
    lockstep(small[::4], order=holes)
    done("other memory formats")
    for dtype in (torch.bfloat16, torch.float16):
        lockstep(small[::2], dtype=dtype, order=channels_last)
        done(str(dtype))
    lockstep(small[::3], merge_dims=True, max_precond_dim=64, precondition_1d=True, maximize=True)
    lockstep(small[::3], max_precond_dim=16, data_format="channels_last", merge_dims=True)
    lockstep(small[::5], max_precond_dim=0)
    wide = [(513, 5), (5, 513), (2, 513, 3), (700,), (513,), (600, 2, 2)]
    lockstep(wide, precondition_1d=True, compare=False)
    done("merged, limited, wide modes")


def check_large_parameters():
    """Above 2^21 elements all threads share a parameter: other code, other scratch."""
    lockstep([(2100, 25, 5, 9), (2**21 + 17, 1), (3, 3)], max_precond_dim=32, compare=False, steps=2)
    lockstep([(70, 5, 5, 1200), (64, 33, 1000)], max_precond_dim=128, compare=False, steps=2, normalize_grads=True)
    # a mode that is wide, and pieces of the rest that threads share unevenly
    lockstep([(570, 3701)], max_precond_dim=600, compare=False, steps=2, precondition_frequency=10)
    done("parameters above 2^21 elements")


def check_unusable_gradients(some):
    """Gradients that are not usable, then zeros."""
    warnings.simplefilter("ignore", UserWarning)
    bad = [torch.zeros(s) for s in some]
    fused = SoapRun(random_params(some), fused=True, precondition_frequency=1)
    for value in (0.0, float("nan"), 1.0, float("inf"), 1e30, 1e-30):
        fused.step([g + value for g in bad])
    done("gradients of zeros, infinities, 1e30 and 1e-30")


def check_operators():
    sizes = [*SIZES, 25, 31, 32, 63, 65]
    for dtype, tolerance in itertools.product((torch.float32, torch.float64), (-1.0, 0.5)):
        data = [torch.randn(d, d + 3, dtype=dtype) for d in sizes]
        grams = [x @ x.mT for x in data]
        bases = torch.ops.soap_opt.init_basis(grams + grams[:5] * 8)
        refresh_bases_(grams, bases[: len(grams)], tolerance)
    done("refresh_basis_ and init_basis")


def run(short: bool) -> None:
    """All of them; ``short``: one step or two, in which the errors of --self-test must show."""
    reason = soap_opt._ext.unavailable("cpu")
    if reason is not None:
        sys.exit(reason)
    limit = ctypes.c_int.in_dll(ctypes.CDLL(sys.modules["soap_opt._C"].__file__), "soap_opt_isa_limit")
    cpu.scratch = exact_scratch
    if short:
        lockstep([(40, 33), (6, 4, 3, 3)], compare=False)
        return
    check_every_shape()
    torch.set_num_threads(1)  # the specification's many small calls would spend their time in barriers
    small = [s for s in shapes() if 0 < torch.Size(s).numel() <= 3000]
    check_instruction_sets(small, limit)
    check_options(small)
    check_large_parameters()
    check_unusable_gradients(small[::3])
    check_operators()
