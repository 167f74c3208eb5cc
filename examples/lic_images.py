"""Reading image files.

What a file becomes: the first frame of what it holds, turned as its EXIF orientation says, as 8-bit RGB. Grey is repeated,
palettes are looked up, CMYK is converted by Pillow's formula (colour profiles are not applied), alpha channels are dropped.
16 bits per channel are rounded to 8, v * 255 / 65535; 32-bit integers and floats have no agreed range and are refused.
"""

import re
import struct
from pathlib import Path

import numpy as np
import torch
from lic_files import InputError
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

FORMATS = {"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}  # Pillow's names
Image.init()
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS} | {".jpg", ".jpeg"}
OTHER_IMAGES = {".arw", ".cr2", ".cr3", ".dng", ".exr", ".heic", ".heif", ".jxl", ".nef", ".orf", ".raf", ".raw", ".rw2"}

READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, struct.error, RuntimeError, MemoryError)


def open_image(path: Path) -> Image.Image:
    """The image with its header read, its pixels not yet.

    Raises:
        InputError: it is none, or its pixels have no agreed range.
    """
    try:
        image = Image.open(path, formats=tuple(FORMATS & Image.OPEN.keys()))
    except READ_ERRORS as error:
        raise InputError(f"cannot read {path} as an image: {cause(error, path)}") from error
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # (a PGM of more than 8 bits is scaled to 16)
        raise InputError(f"cannot read {path} as an image: 32 bits per channel, whose range is not known; convert it first")
    return image


def cause(error: BaseException, path: Path) -> str:
    """What an exception says, without the path, which the message has already."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip().splitlines()
    return text[0].replace(f" {str(path)!r}", "") if text else type(error).__name__


def is_deep(image: Image.Image) -> bool:
    """Whether the file has 16 bits per channel, of which Pillow would silently cut 8 off if it is in colour."""
    raw_modes = (tile.args if isinstance(tile.args, str) else tile.args[0] for tile in image.tile if tile.args)
    return image.mode.startswith("I") or any(re.search(r";16", str(raw)) for raw in raw_modes)


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after the EXIF orientation is applied, from the header alone."""
    # Pillow gives a TIFF's size turned; a PNG's EXIF may come after its pixels, which are not to be read here.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return image.size
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:  # EXIF that cannot be parsed says nothing; the pixels may be whole
        return image.size
    return image.size[::-1] if turned else image.size


def deep_values(image: Image.Image, path: Path) -> Tensor:
    """The values of a file with 16 bits per channel in colour or with an alpha channel: int32 [C, H, W], as they are stored."""
    if image.mode not in ("RGB", "RGBA"):
        raise ValueError(f"16 bits per channel are not read in the mode {image.mode}")
    if image.format == "PNG":
        try:
            from torchvision.io import ImageReadMode, decode_image  # which torchvision 0.29 says will go one day
        except ImportError as error:
            raise ValueError("a PNG with 16 bits per channel in colour needs torchvision.io.decode_image") from error
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        return decode_image(data, ImageReadMode.UNCHANGED).int()
    if image.format != "TIFF":
        raise ValueError(f"16 bits per channel are not read from {image.format}")
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("a TIFF with 16 bits per channel in colour needs the package tifffile") from error
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            values = torch.from_numpy(page.asarray().astype(np.int32))  # [H, W, C], or [C, H, W] where so stored
            return values if page.axes.startswith("S") else values.movedim(-1, 0)
    except tifffile.TiffFileError as error:
        raise ValueError(str(error)) from error


def to_8_bits(values: Tensor) -> Tensor:
    """round(v * 255 / 65535) of the integers v in 0 .. 65535, as uint8."""
    return ((values + 128) // 257).to(torch.uint8)  # 65535 = 255 * 257, and 257 is odd: there are no ties


def read_image(path: Path) -> Tensor:
    """The image as RGB: uint8 [3, H, W]. What becomes of other kinds of pixels is at the top of this file.

    Raises:
        InputError: it cannot be read, or not to its end.
    """
    try:
        with open_image(path) as image:
            deep, colour = is_deep(image), not image.mode.startswith("I")
            if deep and colour:
                values = deep_values(image, path)
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
                if image.format == "PNG":
                    image.load()  # what decodes 16 bits does not mind a file that breaks off
                colours = values[:3] if len(values) >= 3 else values[:1].expand(3, -1, -1)
                image = Image.fromarray(to_8_bits(colours).movedim(0, -1).contiguous().numpy())
                image.getexif()[ExifTags.Base.Orientation] = orientation
            try:
                ImageOps.exif_transpose(image, in_place=True)
            except READ_ERRORS:
                image.load()  # raises again if it is the pixels that are damaged, and not the EXIF
            if deep and not colour:
                return to_8_bits(torch.from_numpy(np.asarray(image).astype(np.int32))).expand(3, -1, -1)
            return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))
    except READ_ERRORS as error:
        raise InputError(f"cannot read {path} as an image: {cause(error, path)}") from error


def decoded_size(path: Path) -> tuple[int, int]:
    """Width and height of an image whose pixels have all been decoded, and thrown away: a third of read_image's time.

    Raises:
        InputError: as read_image.
    """
    try:
        with open_image(path) as image:
            if not is_deep(image):
                image.load()
                return oriented_size(image)
    except READ_ERRORS as error:
        raise InputError(f"cannot read {path} as an image: {cause(error, path)}") from error
    _, height, width = read_image(path).shape
    return width, height


def centre_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The centre of an image [.., H, W], at most `size` = (h, w); 0 means all of it."""
    (h, w), (H, W) = size, image.shape[-2:]
    h, w = min(h or H, H), min(w or W, W)
    top, left = (H - h) // 2, (W - w) // 2
    return image[..., top : top + h, left : left + w]
