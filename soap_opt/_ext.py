"""The one place that knows which compiled implementations there are, and why the others are not."""

from __future__ import annotations


def unavailable(device_type: str) -> str | None:
    """Why ``fused=True`` cannot run on a device of this type; None where it can."""
    if device_type == "cpu":
        return "this version of soap_opt has no C++ engine for the CPU yet"
    if device_type == "cuda":
        return "this version of soap_opt has no Triton kernels yet"
    return f"soap_opt has no kernels of its own for device type {device_type!r}"


def active(device_type: str) -> str:
    """Name of the implementation that ``foreach=None, fused=None`` picks on a device of this type."""
    return "fused" if unavailable(device_type) is None else "multi tensor"
