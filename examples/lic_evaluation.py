"""Rate and distortion: as the likelihoods promise during training, as real bitstreams afterwards, JPEG's and WebP's beside."""

import bisect
import functools
import hashlib
import io
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from compressai.models import CompressionModel
from compressai.ops import compute_padding
from lic_data import find_images
from lic_files import InputError
from lic_images import centre_crop, open_image, read_image
from lic_models import downsampling_factor, no_coder, one_line
from PIL import Image, features
from pytorch_msssim import ms_ssim
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

MS_SSIM_SIDE = 160  # five scales of an 11 x 11 window need images larger than this
CODEC_QUALITIES = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95)  # Pillow's scale; it advises against JPEG above 95
CACHE_FORMAT = 1  # of stored measurements: another number, and none of them is used any more


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


def ms_ssim_db(value: float) -> float:
    """MS-SSIM in decibels, as compressai.utils.plot draws it; infinite for 1."""
    return -10 * math.log10(1 - value) if value < 1 else math.inf


def distortion(x: Tensor, x_hat: Tensor) -> dict[str, float]:
    """PSNR (dB), and MS-SSIM where the image is large enough, of x_hat against x, both [1, 3, H, W] in [0, 1] and
    compared as they would be saved, in 8 bits."""
    result = {"psnr-rgb": psnr(x, x_hat)}
    if min(x.shape[-2:]) > MS_SSIM_SIDE:
        eight_bit = ((255 * y).clamp(0, 255).round() for y in (x, x_hat))
        result["ms-ssim-rgb"] = ms_ssim(*eight_bit, data_range=255).item()
    return result


def padding_of(model: CompressionModel, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How to pad x [.., H, W] for coding, and back: to multiples of 64, as compressai.utils does, unless that is
    too little for this one."""
    return compute_padding(x.shape[-2], x.shape[-1], min_div=math.lcm(64, downsampling_factor(model)))


@torch.no_grad()
def estimate_image(model: CompressionModel, image: Tensor) -> tuple[dict[str, float], Tensor]:
    """Rate and distortion of an image (uint8 [3, H, W]) by the model's forward pass; nothing is coded.

    Returns the measurements and the reconstruction [3, H, W] in [0, 1], on the CPU. "bpp" is what the likelihoods promise,
    like "bpp-estimated", for which other measurements have another.
    """
    x = to_float(image, next(model.parameters()).device)[None]
    pad, unpad = padding_of(model, x)
    output = model(F.pad(x, pad))
    x_hat = F.pad(output["x_hat"].float(), unpad).clamp(0, 1)
    bits = sum(-likelihoods.log2().sum().item() for likelihoods in output["likelihoods"].values())
    bpp = bits / (x.shape[-2] * x.shape[-1])
    measured = distortion(x, x_hat)
    return {"bpp": bpp, "bpp-estimated": bpp, "psnr-forward": measured["psnr-rgb"], **measured}, x_hat[0].cpu()


@torch.no_grad()
def code_image(model: CompressionModel, image: Tensor) -> tuple[dict[str, float], Tensor]:
    """Encode an image (uint8 [3, H, W]) into bytes and decode it again; model.update() has to come first.

    Returns the measurements and the decoded image, on the CPU. Sizes count every byte of the strings and nothing else, as
    CompressAI does. "psnr-forward" is the PSNR of model.forward's reconstruction, which the decoder should reproduce;
    context models round around other means there than in their coder, and differ a little.
    """
    x = to_float(image, next(model.parameters()).device)[None]
    pad, unpad = padding_of(model, x)
    start = time.perf_counter()
    code = model.compress(F.pad(x, pad))
    encoded = time.perf_counter()
    decoded = model.decompress(code["strings"], code["shape"])["x_hat"].cpu()  # (a GPU has finished when it is here)
    finished = time.perf_counter()
    x_hat = F.pad(decoded, unpad).clamp(0, 1)
    estimate, _ = estimate_image(model, image)
    result = {
        **distortion(x.cpu(), x_hat),
        "bpp": 8 * sum(len(string[0]) for string in code["strings"]) / (x.shape[-2] * x.shape[-1]),
        "encoding_time": encoded - start,
        "decoding_time": finished - encoded,
        "bpp-estimated": estimate["bpp"],
        "psnr-forward": estimate["psnr-rgb"],
    }
    return result, x_hat[0]


def rate_distortion(model: CompressionModel, images: Iterable[Tensor], bitstreams: bool = True) -> list[dict[str, float]]:
    """What code_image measures of each image (uint8 [3, H, W]), or without `bitstreams` what estimate_image does.

    The model is in evaluation mode, its entropy coder's tables made (model.update()), as load_trained leaves it.
    """
    measure = code_image if bitstreams else estimate_image
    return [measure(model, image)[0] for image in images]


def why_not_coded(model: CompressionModel, image: Tensor) -> str:
    """Why a model from a file makes no bitstreams, found out by coding the centre of an image; empty if it does.
    model.update() has to come first."""
    if reason := no_coder(model):
        return reason
    side = 3 * downsampling_factor(model)  # as large as its forward pass was tried with
    try:
        code_image(model, centre_crop(image, (side, side)))
    except Exception as error:  # somebody else's code; training is done, and its results are to be written
        return f"{type(model).__name__} cannot code on the CPU: {one_line(error)}"
    return ""


def mean_results(results: list[dict[str, float]]) -> dict[str, float]:
    """The mean of every measurement that all images have (small ones have no MS-SSIM)."""
    keys = [key for key in results[0] if all(key in result for result in results)]
    return {key: sum(result[key] for result in results) / len(results) for key in keys}


def write_eval_json(
    path: Path, name: str, results: dict[str, float] | list[dict[str, float]], description: str | None = None
) -> None:
    """CompressAI's eval_model layout, which compressai.utils.plot reads: one list entry per operating point of `results`."""
    points = [results] if isinstance(results, dict) else results
    keys = ("psnr-rgb", "ms-ssim-rgb", "bpp", "encoding_time", "decoding_time")
    default = "Inference (ans)" if "encoding_time" in points[0] else "Inference (entropy-estimation)"
    layout = {
        "name": name,
        "description": description or default,
        "results": {key: [point[key] for point in points] for key in keys if all(key in point for point in points)},
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
    encode = functools.cache(lambda quality: encode_jpeg(picture, quality))

    def jpeg_bpp(quality: int) -> float:
        return 8 * len(encode(quality)) / pixels

    above = bisect.bisect_left(qualities, bpp, hi=len(qualities) - 1, key=jpeg_bpp)  # sizes grow with quality
    quality = min(qualities[max(0, above - 1) : above + 1], key=lambda q: abs(jpeg_bpp(q) - bpp))
    data = encode(quality)
    return to_float(pil_to_tensor(Image.open(io.BytesIO(data)))), 8 * len(data) / pixels


def jpeg_level(model: CompressionModel, criterion: nn.Module, images: list[Tensor]) -> tuple[float, float, float]:
    """JPEG where the model is: the mean PSNR (dB) and bpp of JPEG on `images` (uint8 [3, H, W]), each coded at about the rate
    that the model's likelihoods promise for this image, and the mean of those rates (bpp).

    At each image's own rate, not at their mean: a model spends more on images with more in them, and JPEG is to have the same
    for the same. It takes an evaluation, and some eight encodings of each image: 1.5 s on a core for the crops of the twelve
    photographs.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    for image in images:
        rate = evaluate(model, criterion, [image])["bpp"]
        decoded, bpp = jpeg_at(image, rate)
        totals += torch.tensor([psnr(decoded, to_float(image)), bpp, rate], dtype=torch.float64)
    return tuple((totals / len(images)).tolist())


# ---- codecs ----


def encode_webp(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=6)  # its slowest and best search
    return buffer.getvalue()


CODECS = {"jpeg": ("JPEG", encode_jpeg), "webp": ("WebP", encode_webp)}  # name -> label, encoder


def code_with(codec: str, quality: int, image: Tensor) -> dict[str, float]:
    """An image (uint8 [3, H, W]) through Pillow's "jpeg" (4:2:0, optimised Huffman tables) or "webp" (lossy, method 6).

    The same measurements as code_image's; a size is that of the whole file, headers too.
    """
    if codec == "webp" and not features.check("webp"):
        raise InputError("--classic webp: this Pillow was built without WebP")
    picture = to_pil_image(image)
    start = time.perf_counter()
    data = CODECS[codec][1](picture, quality)
    encoded = time.perf_counter()
    with Image.open(io.BytesIO(data)) as file:
        decoded = pil_to_tensor(file.convert("RGB"))
    finished = time.perf_counter()
    return {
        "bpp": 8 * len(data) / (image.shape[-2] * image.shape[-1]),
        **distortion(to_float(image)[None], to_float(decoded)[None]),
        "encoding_time": encoded - start,
        "decoding_time": finished - encoded,
    }


# ---- evaluation images, and measurements that survive an interruption ----


@dataclass(frozen=True)
class ImageSet:
    """Images to evaluate on. They are read one by one: a test set of large photographs need not fit into memory.

    Attributes:
        files: the images.
        names: as tables call them, each once.
        digest: of their names and bytes.
    """

    files: list[Path]
    names: list[str]
    digest: str

    def __len__(self) -> int:
        return len(self.files)


def image_set(paths: Iterable[Path | str]) -> ImageSet:
    """All images of `paths`, which are images or folders of them, searched recursively.

    Raises:
        InputError: a path does not exist, a folder holds no image, or some cannot be read (all are named).
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"--images {path} does not exist")
        found = find_images(path) if path.is_dir() else [path]
        if not found:
            raise InputError(f"--images {path}: no images below it")
        files += [file for file in found if file not in files]
    problems, digest = [], hashlib.sha256()
    stems = [file.stem for file in files]
    names = [file.stem if stems.count(file.stem) == 1 else str(file) for file in files]
    for file, name in zip(files, names):
        try:
            open_image(file).close()
            digest.update(name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
        except (InputError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise InputError("; ".join(problems))
    return ImageSet(files, names, digest.hexdigest())


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    try:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {path}: {error.strerror}") from error


def read_stored(path: Path) -> dict | None:
    """What measure_stored wrote there, for the same format; None when there is nothing that can be used."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) and stored.get("format") == CACHE_FORMAT else None


def measure_stored(
    path: Path,
    about: dict,
    images: ImageSet,
    prepare: Callable[[], Callable[[Tensor], dict[str, float]]],
    progress: tqdm | None = None,
) -> list[dict[str, float]]:
    """Measurements of every image, in order; those that the JSON file `path` holds are not made again.

    The file is replaced after each image, by renaming, so that an interrupted evaluation goes on where it was. Its name
    has to tell apart whatever the measurements depend on. `about` is kept in it as it is. `prepare()` returns the function
    that measures an image (uint8 [3, H, W]); it is called when there is anything left to measure.
    """
    stored = read_stored(path) or {"format": CACHE_FORMAT, "about": about, "results": {}}
    results, measure = stored["results"], None
    for file, name in zip(images.files, images.names):
        if name not in results:
            measure = measure or prepare()
            results[name] = measure(read_image(file))
            partial_file = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            partial_file.write_text(json.dumps(stored, indent=1))
            partial_file.replace(path)
        if progress is not None:
            progress.update()
    return [results[name] for name in images.names]


def measure_codec(codec: str, images: ImageSet, folder: Path, progress: tqdm | None = None) -> dict[int, list[dict]]:
    """code_with's measurements: quality -> one per image, for CODEC_QUALITIES. `folder` keeps them: measure_stored."""
    return {
        setting: measure_stored(
            folder / f"{codec}-{setting}-{images.digest[:16]}.json",
            {"codec": codec, "quality": setting},
            images,
            partial(partial, code_with, codec, setting),
            progress,
        )
        for setting in CODEC_QUALITIES
    }
