"""Photographs for train_lic.py: finding them, reading them, and cropping them reproducibly."""

from pathlib import Path

import numpy as np
import torch
from lic_stop import ignore_signals
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor

# Decoding a photograph costs as much as a training step of a small model: a set that fits is decoded once.
CACHE_BYTES = 2 << 30
MAX_HELD_OUT = 24


class InputError(Exception):
    """Something that the user gave cannot be used; the message is the one line to show."""


def find_images(folder: Path) -> list[Path]:
    """All images below `folder`, sorted, so that an index means the same image in every run."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMG_EXTENSIONS and f.is_file())


def find_dataset(root: Path) -> tuple[list[Path], list[Path]]:
    """Training and evaluation images below `root`.

    Either CompressAI's layout (train/ and test/; eval/ and val/ are understood too), or any folder: then every tenth
    image, at most 24, is held out to evaluate on. A single image serves as both.
    """
    if not root.is_dir():
        raise InputError(f"--dataset {root} is not a folder")
    train_dir = root / "train" if (root / "train").is_dir() else root
    train = find_images(train_dir)
    if not train:
        raise InputError(f"no images below {train_dir}")
    if train_dir != root:
        for split in ("test", "eval", "val"):
            if held_out := find_images(root / split):
                return train, held_out
    if len(train) == 1:
        return train, train
    held_out = train[::10][:MAX_HELD_OUT]
    return [f for f in train if f not in set(held_out)], held_out


def open_image(path: Path) -> Image.Image:
    """The image with its header read, its pixels not yet."""
    try:
        image = Image.open(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises on damaged data
        raise InputError(f"cannot read {path} as an image") from error
    if image.mode[0] in "IF":  # Pillow would clip 16 bits to 8, and train on white
        raise InputError(f"{path} has more than 8 bits per channel (Pillow's mode {image.mode}); convert it first")
    return image


def read_image(path: Path) -> Tensor:
    """The image as RGB: uint8 [3, H, W]."""
    try:
        with open_image(path) as image:
            return pil_to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"cannot read {path} as an image: {error}") from error


class RandomCrops(Dataset):
    """Random crops of photographs as uint8 [3, h, w], numbered without end: crop i of a seed is always the same crop.

    The crop depends on (seed, i) alone, not on a generator's history: so neither the number of workers nor an
    interruption changes what a step sees. Every run of len(files) crops shows each photograph once.
    """

    def __init__(self, files: list[Path], size: tuple[int, int], seed: int):
        self.files, self.size, self.seed = files, size, seed
        pixels = 0
        for file in files:
            with open_image(file) as image:
                width, height = image.size
            if height < size[0] or width < size[1]:
                raise InputError(f"{file} is {width} x {height} pixels, smaller than --patch-size {size[1]} x {size[0]}")
            pixels += width * height
        self.decoded = [read_image(f) for f in files] if 3 * pixels <= CACHE_BYTES else None
        self._order = (-1, np.empty(0))  # of the epoch seen last

    def __getitem__(self, index: int) -> Tensor:
        epoch, position = divmod(index, len(self.files))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.files)))
        which = self._order[1][position]
        image = self.decoded[which] if self.decoded else read_image(self.files[which])  # [3, H, W]
        (h, w), (_, H, W) = self.size, image.shape
        top, left = np.random.default_rng((self.seed, 1, index)).integers((H - h + 1, W - w + 1))
        return image[:, top : top + h, left : left + w]


class PartsOfBatches(Sampler):
    """The indices start .. start + part - 1 of every batch of `batch_size`, from batch `first` to before `last`."""

    def __init__(self, first: int, last: int, batch_size: int, start: int, part: int):
        self.starts, self.part = range(first * batch_size + start, last * batch_size, batch_size), part

    def __len__(self) -> int:
        return len(self.starts) * self.part

    def __iter__(self):
        for start in self.starts:
            yield from range(start, start + self.part)


def batches(
    crops: RandomCrops, first: int, last: int, batch_size: int, num_workers: int, pin_memory: bool, rank: int = 0, size: int = 1
):
    """The batches of steps first .. last - 1, each uint8 [batch_size / size, 3, h, w]: of every batch the part that is for
    process `rank` of `size`."""
    part = batch_size // size
    return DataLoader(
        crops,
        batch_size=part,
        sampler=PartsOfBatches(first, last, batch_size, rank * part, part),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
        # Its own generator: the default would draw from torch's global one, which the quantisation noise comes from,
        # once per start, and a resumed run would see other noise than an uninterrupted one.
        generator=torch.Generator(),
    )


def centre_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The centre of an image [.., H, W], at most `size` = (h, w); 0 means all of it."""
    (h, w), (H, W) = size, image.shape[-2:]
    h, w = min(h or H, H), min(w or W, W)
    top, left = (H - h) // 2, (W - w) // 2
    return image[..., top : top + h, left : left + w]
