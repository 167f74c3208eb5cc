"""Which kind of processor this is, as far as timings depend on it: results are kept apart by it.

``python -m bench processor`` prints it; every suite does before it measures.
"""

from __future__ import annotations

import platform
import re
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .results import RESULTS, significant

# (vendor, family, model) -> what the field calls it. A virtual machine's brand says "AMD EPYC" of every generation.
KINDS = {
    ("AuthenticAMD", 23, 49): "zen2",
    ("AuthenticAMD", 25, 1): "zen3",
    ("AuthenticAMD", 25, 17): "zen4",
    ("AuthenticAMD", 25, 160): "zen4",
    ("AuthenticAMD", 26, 2): "zen5",
    ("GenuineIntel", 6, 85): "skylake-server",
    ("GenuineIntel", 6, 106): "ice-lake-server",
    ("GenuineIntel", 6, 143): "sapphire-rapids",
    ("GenuineIntel", 6, 207): "emerald-rapids",
    ("GenuineIntel", 6, 173): "granite-rapids",
}
NAMES = {
    "zen3": "AMD EPYC (Zen 3)",
    "zen4": "AMD EPYC (Zen 4)",
    "zen5": "AMD EPYC (Zen 5)",
    "sapphire-rapids": "Intel Xeon (Sapphire Rapids)",
    "emerald-rapids": "Intel Xeon (Emerald Rapids)",
}

SHARED = 0.7  # of threads x one thread's rate: below it two threads share a core, or another process takes one of them
TURBO = 1.25  # a virtual machine states the nominal clock; a core runs at 1 to 1.5 times that


@lru_cache(maxsize=1)
def info() -> dict[str, Any]:
    """py-cpuinfo's findings; nothing where it is not installed."""
    try:
        from cpuinfo import get_cpu_info
    except ImportError:
        return {}
    return dict(get_cpu_info())


def kind() -> str:
    """The processor's kind, as a folder's name."""
    found = info()
    vendor, family, model = (found.get(key) for key in ("vendor_id_raw", "family", "model"))
    name = KINDS.get((vendor, family, model)) or f"{vendor or platform.machine()}-{family or 0}-{model or 0}"
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def results() -> Path:
    """Where timings of this kind of processor are kept: another kind's are never overwritten."""
    return RESULTS / kind()


def measured() -> list[Path]:
    """The folders of all kinds that something was measured on."""
    return sorted(folder for folder in RESULTS.iterdir() if folder.is_dir() and any(folder.glob("*.csv")))


def name_of(kind: str) -> str:
    """A kind in words."""
    return NAMES.get(kind, kind)


def describe() -> str:
    """Brand, kind, matrix instructions, float32 rates and what follows from them: one line. Takes half a second."""
    found = info()
    flags = set(found.get("flags", ()))
    sets = [name for name, flag in (("AVX2", "avx2"), ("AVX-512", "avx512f"), ("AMX-BF16", "amx_bf16")) if flag in flags]
    threads = torch.get_num_threads()
    try:
        one, many = product_rate(1, torch.float32), product_rate(threads, torch.float32)
        low = product_rate(1, torch.bfloat16), product_rate(threads, torch.bfloat16)
    finally:
        torch.set_num_threads(threads)
    parts = [
        f"{found.get('brand_raw', platform.processor() or platform.machine())} ({kind()})",
        ", ".join(sets) or "no AVX2",
        f"float32 products {one:.0f} GF/s with one thread, {many / one:.2f} times that with {threads}"
        + (" (they share a core, or something else runs)" if many < SHARED * threads * one else ""),
        f"bfloat16 {low[0]:.0f} GF/s, {low[1] / low[0]:.2f} times",
    ]
    if clock := float(found.get("hz_actual", (0, 0))[0]):
        lanes = 16 if "avx512f" in flags else 8
        rate = one * 1e9 / (2 * lanes * clock)
        parts.append(
            f"about {max(1, round(rate / TURBO))} FMA units: {rate:.2f} multiplications of {lanes} lanes a cycle of "
            f"{clock / 1e9:.1f} GHz, which a virtual machine may state too low"
        )
    return "; ".join(parts)


def product_rate(threads: int, dtype: torch.dtype, size: int = 1024, calls: int = 6) -> float:
    """GF/s of the quickest product of two matrices [size, size]."""
    torch.set_num_threads(threads)
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out, seconds = torch.empty(size, size, dtype=dtype), []
    for _ in range(calls):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return significant(2e-9 * size**3 / min(seconds))
