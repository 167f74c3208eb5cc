"""CompressAI's image models by name and width. Nothing is ever downloaded: every model starts from random weights."""

import inspect

from compressai.models import CompressionModel
from compressai.registry import MODELS
from compressai.zoo.image import cfgs as zoo_widths  # model -> quality -> (N, M) or (N,)
from lic_data import InputError

# Small enough to train in minutes on two cores; the papers' widths are --quality's.
DEFAULT_N, DEFAULT_M = 48, 64


def image_models() -> dict[str, type[CompressionModel]]:
    """CompressAI's registry without its point cloud and video models."""
    others = ("compressai.models.pointcloud", "compressai.models.video")
    return {
        name: cls
        for name, cls in MODELS.items()
        if isinstance(cls, type) and issubclass(cls, CompressionModel) and not cls.__module__.startswith(others)
    }


def model_widths(name: str, quality: int | None, N: int | None, M: int | None) -> dict[str, int]:
    """The constructor's widths: the zoo's for --quality, or --N and --M with this script's small defaults."""
    has_M = "M" in inspect.signature(image_models()[name]).parameters
    if M is not None and not has_M:
        raise InputError(f"--M: {name} has only one width, --N")
    if quality is None:
        return {"N": N or DEFAULT_N} | ({"M": M or DEFAULT_M} if has_M else {})
    if N is not None or M is not None:
        raise InputError("--quality sets the widths: give it, or --N/--M, not both")
    if name not in zoo_widths:
        raise InputError(f"--quality: {name} has no qualities in CompressAI's zoo; give --N/--M instead")
    if quality not in zoo_widths[name]:
        raise InputError(f"--quality {quality}: {name} has {min(zoo_widths[name])} to {max(zoo_widths[name])}")
    return dict(zip("NM", zoo_widths[name][quality], strict=False))


def build_model(name: str, widths: dict[str, int]) -> CompressionModel:
    """The model with random weights (torch's global generator)."""
    model_class = image_models()[name]
    extra = {}
    if "groups" in inspect.signature(model_class).parameters and (M := widths["M"]) <= 128:
        # ELIC's first four channel groups are fixed at 128 in all; below that, the proportions of its M = 320.
        groups = [max(1, M // 20), max(1, M // 20), max(1, M // 10), max(1, M // 5)]
        extra["groups"] = [*groups, M - sum(groups)]
    try:
        return model_class(**widths, **extra)
    except Exception as error:
        given = ", ".join(f"{key}={value}" for key, value in widths.items())
        raise InputError(f"{name} cannot be built with {given}: {error}") from error


def downsampling_factor(model: CompressionModel) -> int:
    """What an image's sides have to be a multiple of. The models without the property all have a hyperprior: 64."""
    return getattr(model, "downsampling_factor", 64)
