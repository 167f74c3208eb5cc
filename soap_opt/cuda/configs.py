"""How each Triton kernel is compiled for each architecture: warps, pipeline stages, depth of an iteration, precision.

This module needs neither Triton nor a GPU. ``SOAP_OPT_KERNELS`` in the environment overrides the choices, for sweeps on a GPU.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

ACCELERATOR = "hip" if torch.version.hip else "cuda"
KERNELS = ("project_first", "gram_ema", "project", "project_adam", "project_apply", "reexpress", "due")


class Config(NamedTuple):
    """The compile-time parameters of a kernel."""

    warps: int
    stages: int
    deep: int = 0  # values of i in an iteration of a product, columns in one of a Gram's widest tile; 0: no such loop


def _configs(architecture: str) -> dict[str, Config]:
    """The configuration of every kernel, for "sm_80" (to sm_89), "sm_90", "sm_100" (and later) or "hip"."""
    # These choices come from the compilers' figures (bench/compile_kernels.py; Triton 3.6 and 3.8), not from measurements on a
    # GPU. With four warps, two programs share a multiprocessor's registers and hide each other's barriers. On sm_90 a 64-row
    # tile is then the tile of one warpgroup: 6 wgmma and 3 barriers for 16 i, against 10 and 11, and as many instructions for
    # each of half the warps. No kernel may spill: Adam's epilogue, and every other kernel that would spill, takes more warps.
    # 32 i in an iteration would halve the barriers, but then one of the two Tritons spills, or both.
    # AMD's wavefronts are 64 wide: four of them are as many threads as eight warps.
    configs = {**dict.fromkeys(KERNELS, Config(4, 3, 16)), "due": Config(4, 1)}
    if architecture != "hip":
        configs["project_adam"] = Config(8, 3, 16)
    if architecture == "sm_80":
        configs["project_first"] = Config(16, 3, 16)
    elif architecture == "sm_100":
        configs["gram_ema"] = Config(8, 3, 16)
    return configs


def overridden(configs: dict[str, Config], text: str) -> dict[str, Config]:
    """The configurations, changed as ``text`` (SOAP_OPT_KERNELS) says: "deep=32 gram_ema.warps=4", for all kernels or for one.

    Every choice computes the same up to rounding. (precision_of reads "precision=ieee".)
    """
    configs = dict(configs)
    for setting in text.split():
        name, _, value = setting.partition("=")
        if name == "precision":
            continue
        kernel, _, field = name.rpartition(".")
        if not _is_valid(kernel, field, value):
            raise ValueError(
                f"Invalid SOAP_OPT_KERNELS: {setting!r} is neither precision=NAME nor [KERNEL.]FIELD=NUMBER with a kernel of "
                f"{', '.join(KERNELS)} and a field of {', '.join(Config._fields)} (warps and deep: powers of two, deep from 16)"
            )
        for target in [kernel] if kernel else configs:
            if field != "deep" or configs[target].deep:
                configs[target] = configs[target]._replace(**{field: int(value)})
    return configs


def _is_valid(kernel: str, field: str, value: str) -> bool:
    if field not in Config._fields or (kernel and kernel not in KERNELS) or not value.isdecimal():
        return False
    number = int(value)
    is_power = number > 0 and number & (number - 1) == 0
    return number > 0 if field == "stages" else is_power and (field == "warps" or number >= 16)


def precision_of(default: str, text: str) -> str:
    """The precision of "highest": ``default`` unless ``text`` (SOAP_OPT_KERNELS) has "precision=ieee" or "..=tf32x3"."""
    chosen = default
    for setting in text.split():
        name, _, value = setting.partition("=")
        if name == "precision":
            if value not in ("tf32x3", "ieee"):
                raise ValueError(f"Invalid SOAP_OPT_KERNELS: {setting!r}; precision is tf32x3 or ieee")
            chosen = value
    return chosen


OVERRIDES = os.environ.get("SOAP_OPT_KERNELS", "")
CONFIGS = {architecture: overridden(_configs(architecture), OVERRIDES) for architecture in ("sm_80", "sm_90", "sm_100", "hip")}


def config_of(architecture: str, kernel: str) -> Config:
    """The configuration of a kernel. kernel: the name of its function."""
    return CONFIGS[architecture][kernel.removesuffix("_kernel")]


def architecture_of(backend: str, arch: int | str) -> str:
    """The key of CONFIGS for Triton's target."""
    if backend == "hip":
        return "hip"
    return "sm_100" if int(arch) >= 100 else "sm_90" if int(arch) >= 90 else "sm_80"


# The precision of products, by the accelerator's kind. Plain TF32 is known to ruin the basis.
# tf32x3 (three TF32 products, 21 bits of mantissa) does not compile for AMD.
PRECISION = {"cuda": precision_of("tf32x3", OVERRIDES), "hip": "ieee"}
# The precision of projections with precision="high". The Grams keep the one above.
HIGH_PRECISION = {"cuda": "tf32", "hip": "ieee"}
