"""Rate and distortion: as the likelihoods promise during training, as real bitstreams afterwards, and JPEG's beside."""

import bisect
import io
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from compressai.models import CompressionModel
from compressai.ops import compute_padding
from lic_models import downsampling_factor
from PIL import Image
from pytorch_msssim import ms_ssim
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

MS_SSIM_SIDE = 160  # five scales of an 11 x 11 window need images larger than this


def to_float(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [.., H, W] to float32 in [0, 1] on `device`; moved as bytes, a quarter of the traffic."""
    return images.to(device, non_blocking=True).float() / 255


def psnr(a: Tensor, b: Tensor) -> float:
    """PSNR (dB) of two images in [0, 1] as they would be saved, in 8 bits: CompressAI's "psnr-rgb"."""
    a, b = ((255 * image).clamp(0, 255).round() for image in (a, b))
    return 20 * math.log10(255) - 10 * (a - b).pow(2).mean().log10().item()


def forward_padded(model: CompressionModel, x: Tensor) -> dict:
    """The model's output for x of any size [1, 3, H, W]: padded as CompressAI pads before its encoder, and cut back."""
    pad, unpad = compute_padding(x.shape[-2], x.shape[-1], min_div=downsampling_factor(model))
    output = model(F.pad(x, pad))
    return {"x_hat": F.pad(output["x_hat"], unpad), "likelihoods": output["likelihoods"]}


def batches_of_one_size(images: list[Tensor], batch_size: int) -> Iterator[list[Tensor]]:
    """Neighbouring images of one shape, up to `batch_size` at a time."""
    for _, alike in itertools.groupby(images, key=lambda image: image.shape):
        alike = list(alike)
        yield from (alike[i : i + batch_size] for i in range(0, len(alike), batch_size))


@torch.no_grad()
def evaluate(
    model: CompressionModel,
    criterion: nn.Module,
    images: list[Tensor],
    batch_size: int = 1,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Means over `images` (uint8 [3, H, W]) of the loss, the estimated bpp, the MSE (on [0, 1]) and the PSNR (dB).

    Up to `batch_size` neighbours of one size go through the model together. None: `interrupted` said so between two batches.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    totals = {"loss": 0.0, "bpp": 0.0, "mse": 0.0, "psnr": 0.0}
    try:
        for batch in batches_of_one_size(images, batch_size):
            if interrupted():
                return None
            x = to_float(torch.stack(batch), device)
            output = forward_padded(model, x)
            terms = criterion(output, x)
            totals["loss"] += terms["loss"].item() * len(batch)
            totals["bpp"] += terms["bpp_loss"].item() * len(batch)
            totals["mse"] += F.mse_loss(output["x_hat"], x).item() * len(batch)
            totals["psnr"] += sum(psnr(*pair) for pair in zip(output["x_hat"], x, strict=True))
    finally:
        model.train(was_training)
    return {key: total / len(images) for key, total in totals.items()}


@torch.no_grad()
def code_image(model: CompressionModel, image: Tensor) -> tuple[dict[str, float], Tensor]:
    """Encode an image (uint8 [3, H, W]) into bytes and decode it again; model.update() has to come first.

    Returns the measurements and the decoded image. Sizes count every byte of the strings and nothing else, as
    CompressAI does. "psnr-forward" is the PSNR of model.forward's reconstruction, which the decoder should reproduce;
    context models round around other means there than in their coder, and differ a little.
    """
    x = to_float(image)[None]
    pad, unpad = compute_padding(x.shape[-2], x.shape[-1], min_div=64)  # 64 for every model, as compressai.utils does
    start = time.perf_counter()
    code = model.compress(F.pad(x, pad))
    encoded = time.perf_counter()
    decoded = model.decompress(code["strings"], code["shape"])
    finished = time.perf_counter()
    x_hat = F.pad(decoded["x_hat"], unpad).clamp(0, 1)

    output = model(F.pad(x, pad))
    bits = sum(-likelihoods.log2().sum().item() for likelihoods in output["likelihoods"].values())
    pixels = x.shape[-2] * x.shape[-1]
    result = {
        "psnr-rgb": psnr(x, x_hat),
        "bpp": 8 * sum(len(string[0]) for string in code["strings"]) / pixels,
        "encoding_time": encoded - start,
        "decoding_time": finished - encoded,
        "bpp-estimated": bits / pixels,
        "psnr-forward": psnr(x, F.pad(output["x_hat"], unpad)),
    }
    if min(x.shape[-2:]) > MS_SSIM_SIDE:
        eight_bit = ((255 * y).round() for y in (x, x_hat))
        result["ms-ssim-rgb"] = ms_ssim(*eight_bit, data_range=255).item()
    return result, x_hat[0]


def mean_results(results: list[dict[str, float]]) -> dict[str, float]:
    """The mean of every measurement that all images have (small ones have no MS-SSIM)."""
    keys = [key for key in results[0] if all(key in result for result in results)]
    return {key: sum(result[key] for result in results) / len(results) for key in keys}


def write_eval_json(path: Path, name: str, results: dict[str, float]) -> None:
    """CompressAI's eval_model layout, which compressai.utils.plot reads: one list entry per operating point."""
    keys = ("psnr-rgb", "ms-ssim-rgb", "bpp", "encoding_time", "decoding_time")
    layout = {
        "name": name,
        "description": "Inference (ans)",
        "results": {key: [results[key]] for key in keys if key in results},
    }
    path.write_text(json.dumps(layout, indent=2) + "\n")


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def jpeg_at(image: Tensor, bpp: float) -> tuple[Tensor, float]:
    """The JPEG of `image` (uint8 [3, H, W]) whose whole file is nearest to `bpp`: decoded image in [0, 1] and
    its bpp."""
    pixels, picture = image.shape[-2] * image.shape[-1], to_pil_image(image)
    qualities = range(1, 96)  # Pillow's recommended range

    def jpeg_bpp(quality: int) -> float:
        return 8 * len(encode_jpeg(picture, quality)) / pixels

    above = bisect.bisect_left(qualities, bpp, hi=len(qualities) - 1, key=jpeg_bpp)  # sizes grow with quality
    quality = min(qualities[max(0, above - 1) : above + 1], key=lambda q: abs(jpeg_bpp(q) - bpp))
    data = encode_jpeg(picture, quality)
    return to_float(pil_to_tensor(Image.open(io.BytesIO(data)))), 8 * len(data) / pixels
