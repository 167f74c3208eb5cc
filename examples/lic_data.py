"""Photographs for train_lic.py: finding them, checking and reading them, and cropping them reproducibly."""

import hashlib
import mimetypes
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from lic_files import InputError
from lic_images import (
    OTHER_IMAGES,
    READ_ERRORS,
    SUFFIXES,
    cause,
    centre_crop,
    decoded_size,
    is_deep,
    open_image,
    oriented_size,
    read_image,
)
from lic_stop import ignore_signals
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

# Decoding a photograph costs as much as a training step of a small model: a set that fits is decoded once.
CACHE_BYTES = 2 << 30
MAX_HELD_OUT = 24  # of a folder without a split
MAX_FOUND = 100  # of the evaluation images that lie beside the training images, which nobody asked for by name
LISTED = 10  # bad files named in a message


# The folder to train on, and those to evaluate on, the first that has images: CompressAI's and CLIC's, COCO's, DIV2K's
SPLITS = (
    ("train", ("valid", "validation", "test", "eval", "val")),
    ("train2017", ("val2017",)),
    ("train2014", ("val2014",)),
    ("DIV2K_train_HR", ("DIV2K_valid_HR",)),
)
VIMEO = (("sep", 4), ("tri", 2))  # Vimeo-90k's septuplets and triplets: the prefix of their lists, the frame in the middle


# ---- finding ----


@dataclass
class Scan:
    """What lies below a folder: image files by their real path, and the other files that look like images, by suffix."""

    images: dict[str, Path]  # real path -> the path that it was found by
    unused: Counter[str]


def scan(folder: Path) -> Scan:
    """Everything below `folder`. Links to files and folders are followed; a file that can be reached by several paths counts
    once, by the one without links if there is one, else by the first."""
    found, visited = Scan({}, Counter()), set()
    linked: list[tuple[str, Path]] = []  # files, (real path, path)
    later: list[Path] = []  # linked folders: after everything that is there without them
    with tqdm(desc=f"looking through {folder.name}", unit=" files", delay=2, leave=False) as progress:
        pending = [folder]
        while pending or later:
            if not pending:
                later.sort(reverse=True)
                pending.append(later.pop())
            current = pending.pop()
            real = os.path.realpath(current)
            if real in visited:
                continue
            visited.add(real)
            try:
                entries = sorted(os.scandir(current), key=lambda entry: entry.name)
            except OSError as error:
                raise InputError(f"cannot look into the folder {current}: {error.strerror}") from error
            progress.update(len(entries))
            for entry in entries:
                path, suffix = current / entry.name, os.path.splitext(entry.name)[1].lower()
                if path.is_dir() if entry.is_symlink() else entry.is_dir():
                    (later if entry.is_symlink() else pending).append(path)
                elif suffix in SUFFIXES:
                    if entry.is_symlink():  # (a broken one is an unreadable image, and is told of as one)
                        linked.append((os.path.realpath(path), path))
                    elif entry.is_file():
                        found.images[os.path.join(real, entry.name)] = path
                elif suffix in OTHER_IMAGES or (mimetypes.guess_type(entry.name)[0] or "").startswith("image/"):
                    found.unused[suffix] += 1
    for real, path in sorted(linked):
        found.images.setdefault(real, path)
    return found


def find_images(folder: Path) -> list[Path]:
    """All images below `folder`, sorted, so that an index means the same image in every run. See `scan` for links."""
    return sorted(scan(folder).images.values())


def thinned(files: list[Path], most: int) -> list[Path]:
    """At most `most` of the files, evenly spaced."""
    return files if len(files) <= most else [files[k * len(files) // most] for k in range(most)]


def vimeo_frames(root: Path) -> tuple[list[Path], list[Path]] | None:
    """The middle frames of Vimeo-90k's training and test clips as its lists name them, or None for another folder. The other
    frames of a clip show nearly the same."""
    for prefix, frame in VIMEO:
        train, test = (root / f"{prefix}_{split}list.txt" for split in ("train", "test"))
        if train.is_file() and (root / "sequences").is_dir():
            clips = (file.read_text().split() if file.is_file() else [] for file in (train, test))
            return tuple([root / "sequences" / clip / f"im{frame}.png" for clip in sorted(set(names))] for names in clips)
    return None


def find_dataset(root: Path, eval_root: Path | None = None) -> tuple[list[Path], list[Path]]:
    """Training and evaluation images below `root`.

    Layouts: train/ with valid/, validation/, test/, eval/ or val/, the first of them (CLIC's, OpenImages', CompressAI's);
    train2017/ with val2017/ (COCO's); DIV2K's folders; Vimeo-90k's lists (the middle frame of each clip); or any folder: then
    every tenth image, at most 24, is held out to evaluate on. A single image serves as both. Of the evaluation images found
    beside train/ or in Vimeo-90k's list at most 100, evenly spaced, are taken.

    Args:
        eval_root: evaluate on all images below this folder instead. Nothing is held out of `root` then but what lies in both.

    Raises:
        InputError: there is no such folder, or there are no images in it.
    """
    for flag, folder in (("--dataset", root), ("--eval-dataset", eval_root)):
        if folder is not None and not folder.is_dir():
            raise InputError(f"{flag} {folder} is not a folder")
    unused: Counter[str] = Counter()

    def images(folder: Path) -> dict[str, Path]:
        found = scan(folder)
        unused.update(found.unused)
        return found.images

    held_out = None
    if eval_root is not None:
        named = images(eval_root)
        if not named:
            raise InputError(f"no images below {eval_root}{also(unused)}")
        held_out = sorted(named.values())

    if vimeo := vimeo_frames(root):
        train, test = vimeo
        if held_out is None:
            held_out = thinned(test, MAX_FOUND)
    else:
        name, splits = next((split for split in SPLITS if (root / split[0]).is_dir()), ("", ()))
        found = images(root / name)
        if held_out is not None:
            found = {real: path for real, path in found.items() if real not in named}
        train = sorted(found.values())
        if held_out is None:
            candidates = (sorted(images(root / split).values()) for split in splits if (root / split).is_dir())
            held_out = thinned(next(filter(None, candidates), []), MAX_FOUND)
    if not train:
        raise InputError(f"no images below {root if vimeo else root / name}{also(unused)}")
    if unused:
        say(f"not used, since they are not read here: {listing(unused)}")
    if held_out:
        return train, held_out
    if len(train) == 1:
        return train, train
    held_out = train[::10][:MAX_HELD_OUT]
    return [f for f in train if f not in set(held_out)], held_out


def listing(unused: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix} file{'s' * (count > 1)}" for suffix, count in sorted(unused.items()))


def also(unused: Counter[str]) -> str:
    return f" ({listing(unused)} are not read here)" if unused else ""


def say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


# ---- checking ----


@dataclass
class Checked:
    """Files that can be used, in their order; those that cannot, each with the reason."""

    files: list[Path]
    decoded: list[Tensor] | None  # beside files, uint8 [3, H, W]; None where they are too many to keep
    bad: dict[Path, str]
    deep: int  # how many of `files` have 16 bits per channel


def in_threads(function: Callable, items: list, description: str) -> Iterator:
    """function(item) for each item, in order, with a progress bar if it takes longer than two seconds. Pillow decodes without
    Python's lock."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    todo, unit = iter(items), " images"
    with (
        ThreadPoolExecutor(count) as pool,
        tqdm(total=len(items), desc=description, unit=unit, delay=2, leave=False, dynamic_ncols=True) as progress,
    ):
        while some := list(islice(todo, 64 * count)):  # so that an interruption does not wait for all of them
            for result in pool.map(function, some):
                progress.update()
                yield result


def too_small(path: Path, width: int, height: int, least: tuple[int, int], flag: str) -> str:
    if height >= least[0] and width >= least[1]:
        return ""
    return f"{path} is {width} x {height} pixels, smaller than {flag} {least[1]} x {least[0]}"


def check_images(
    files: Iterable[Path],
    least: tuple[int, int] = (1, 1),
    flag: str = "",
    keep_bytes: float = float("inf"),
    decode: bool = True,
) -> Checked:
    """Read every file: its header, and, so that a file that breaks off is noticed before and not in the middle of training,
    its pixels. On all cores at once: a core reads some 7,000 headers a second, and decodes a megapixel of a JPEG in 3 ms and
    of a PNG in 20 ms. 300,000 JPEGs of a quarter of a megapixel take about a minute on eight cores.

    Args:
        least: (h, w) that an image has to have at least, by the option `flag`.
        keep_bytes: the decoded images are kept if they are not more than this together.
        decode: False: the headers only, unless the images are kept anyway.
    """
    files = list(files)

    def header(path: Path) -> tuple[int, bool] | str:
        try:
            with open_image(path) as image:
                width, height = oriented_size(image)
                return too_small(path, width, height, least, flag) or (width * height, is_deep(image))
        except InputError as error:
            return str(error)
        except READ_ERRORS as error:
            return f"cannot read {path} as an image: {cause(error, path)}"

    bad, good, pixels, deep = {}, [], 0, set()
    for path, result in zip(files, in_threads(header, files, "reading headers")):
        if isinstance(result, str):
            bad[path] = result
        else:
            good.append(path)
            pixels += result[0]
            if result[1]:
                deep.add(path)

    keep = 3 * pixels <= keep_bytes
    if not (keep or decode):
        return Checked(good, None, bad, len(deep))

    def whole(path: Path) -> Tensor | str | None:
        try:
            image = read_image(path) if keep else None
            width, height = decoded_size(path) if image is None else (image.shape[2], image.shape[1])
        except InputError as error:
            return str(error)
        return too_small(path, width, height, least, flag) or image

    sound, decoded = [], []
    for path, result in zip(good, in_threads(whole, good, "decoding images" if keep else "checking images")):
        if isinstance(result, str):
            bad[path] = result
        else:
            sound.append(path)
            decoded.append(result)
    bad = {path: bad[path] for path in files if path in bad}
    return Checked(sound, decoded if keep else None, bad, sum(path in deep for path in sound))


def settle(checked: Checked, kind: str, skip_bad: bool) -> None:
    """Say what was found out about the images of a `kind` ("training", "evaluation").

    Raises:
        InputError: some are bad and skip_bad is not given, or all are. The first ten, if there are more than one, are listed on
            stderr before.
    """
    total, bad = len(checked.files) + len(checked.bad), checked.bad
    if checked.deep:
        say(f"{checked.deep} of {total} {kind} images have 16 bits per channel; they are rounded to 8")
    if not bad:
        return
    small = sum("pixels, smaller than" in reason for reason in bad.values())
    kinds = ", ".join(f"{n} {what}" for n, what in ((small, "too small"), (len(bad) - small, "unreadable")) if n)
    if checked.files and (len(bad) > 1 or skip_bad):
        lines = [*list(bad.values())[:LISTED], *([f".. and {len(bad) - LISTED} more"] if len(bad) > LISTED else [])]
        summary = f"{'left out' if skip_bad else 'cannot be used'}: {len(bad)} of {total} {kind} images ({kinds})"
        say("\n  ".join([summary, *lines]))
    if skip_bad and checked.files:
        return
    if not checked.files:
        raise InputError(f"none of {total} {kind} images can be used ({kinds}): {next(iter(bad.values()))}")
    if len(bad) == 1:
        raise InputError(f"{next(iter(bad.values()))} (the only one of {total} {kind} images; --skip-bad leaves it out)")
    smaller = ", or take a smaller --patch-size" if small else ""
    raise InputError(
        f"{len(bad)} of {total} {kind} images cannot be used ({kinds}): replace them, or leave them out with "
        f"--skip-bad{smaller}"
    )


def digest(files: list[Path], root: Path) -> str:
    """Of the files' names and their order, by which a resumed run sees whether it has the same images."""
    names = "\n".join(os.path.relpath(file, root) for file in files)
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()


# ---- cropping ----


class RandomCrops(Dataset):
    """Random crops of photographs as uint8 [3, h, w], numbered without end: crop i of a seed is always the same crop.

    The crop depends on (seed, i) alone, not on a generator's history: so neither the number of workers nor an
    interruption changes what a step sees. Every run of len(files) crops shows each photograph once.

    Args:
        files: images, all of which are read once before anything else, by check_images.
        size: (h, w) of the crops.
        skip_bad: leave out what cannot be read or is smaller than the crops, and replace what becomes unreadable later by the
            next file that can be read, rather than raise InputError.
        decode: False: trust a set that is too large to be kept in memory after its headers (a resumed run has decoded it
            before).

    Attributes:
        files: those that are used.
        bad: those that are not, with the reasons.
    """

    def __init__(self, files: list[Path], size: tuple[int, int], seed: int, skip_bad: bool = False, decode: bool = True):
        checked = check_images(files, size, "--patch-size", CACHE_BYTES, decode)
        settle(checked, "training", skip_bad)
        self.files, self.decoded, self.bad = checked.files, checked.decoded, checked.bad
        self.size, self.seed, self.skip_bad = size, seed, skip_bad
        self._order = (-1, np.empty(0))  # of the epoch seen last
        self._told: set[int] = set()

    def _read(self, which: int) -> Tensor:
        """Image `which`, uint8 [3, H, W]; with skip_bad the next one after it that can still be read."""
        if self.decoded:
            return self.decoded[which]
        for turn in range(len(self.files)):
            path = self.files[(which + turn) % len(self.files)]
            try:
                image = read_image(path)
                if small := too_small(path, image.shape[2], image.shape[1], self.size, "--patch-size"):
                    raise InputError(small)
            except InputError as error:
                if not self.skip_bad:
                    raise InputError(
                        f"{error} (it could be read when training began; --skip-bad goes on without it)"
                    ) from error
                if (which + turn) % len(self.files) not in self._told:
                    self._told.add((which + turn) % len(self.files))
                    say(f"{error}; the next image takes its place")
            else:
                return image
        raise InputError("none of the training images can be read any more")

    def __getitem__(self, index: int) -> Tensor:
        epoch, position = divmod(index, len(self.files))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.files)))
        image = self._read(int(self._order[1][position]))  # [3, H, W]
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
) -> Iterator[Tensor]:
    """The batches of steps first .. last - 1, each uint8 [batch_size / size, 3, h, w]: of every batch the part that is for
    process `rank` of `size`. Workers live until the generator is closed."""
    part = batch_size // size
    loader = iter(
        DataLoader(
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
    )
    try:
        yield from loader
    finally:
        # An exception's traceback holds the loader, whose workers ignore the SIGTERM by which Python ends them at its exit.
        if num_workers:
            loader._shutdown_workers()


def spread_crops(files: list[Path], count: int, side: int = 256) -> list[Tensor]:
    """Centre crops [3, side, side] of `count` of the images, evenly spread, for calibration; where one cannot be read, of the
    next that can."""
    images = []
    for place in range(count):
        for file in files[place * len(files) // count :]:
            try:
                images.append(centre_crop(read_image(file), (side, side)))
                break
            except InputError:
                continue
    return images
