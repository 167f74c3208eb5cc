"""Checkpoints on disk: how train_lic.py keeps and reads its own, and trained models from them or from CompressAI's."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
from compressai.models import CompressionModel
from lic_files import InputError
from lic_models import IN_A_FILE, build_model, image_models, one_line, resolve_model


def load_file(path: Path) -> dict:
    """What torch.save wrote there: plain containers and tensors, on the CPU; never code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged data may raise anything: IndexError, KeyError, UnpicklingError ..
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot read the checkpoint {path}: {reason}") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state


def is_ours(state: dict) -> bool:
    return {"options", "optimizer_name", "history"} <= state.keys()


def read_checkpoint(path: Path) -> dict:
    """A checkpoint of train_lic.py, to resume from."""
    state = load_file(path)
    if not is_ours(state):
        hint = "; --init starts from its weights" if "state_dict" in state else ""
        raise InputError(f"{path} is not a checkpoint of this script{hint}")
    return state


def write_file(path: Path, state: dict) -> None:
    """torch.save so that at no time, not even when the power fails, there is half a checkpoint under this name; and nothing is
    left beside it where writing fails.

    Raises:
        OSError: it cannot be written (torch's own writer says RuntimeError, of a full disk too).
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):
            if isinstance(error.__context__, OSError):  # the reason: "unexpected pos" is how torch's writer saw it
                raise error.__context__ from None
            raise OSError(str(error).strip().splitlines()[0]) from error
        raise


def sync_folder(folder: Path) -> None:
    """A new name is on the disk only when its folder is. (Where folders cannot be opened there is nothing to do.)"""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def give_second_name(path: Path, name: Path) -> None:
    """`name` becomes the file at `path` too, which keeps its own name; a hard link where the file system has them."""
    unfinished = name.with_name(name.name + ".tmp")
    try:
        unfinished.unlink(missing_ok=True)
        try:
            os.link(path, unfinished)
        except OSError:
            shutil.copyfile(path, unfinished)
        os.replace(unfinished, name)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


class Checkpoints:
    """The checkpoints of one optimizer's run: the last, the one before it, and that of the lowest evaluation loss, as
    checkpoint.pth.tar, checkpoint_previous.pth.tar and checkpoint_best_loss.pth.tar (CompressAI's name)."""

    def __init__(self, last: Path):
        stem = last.name.removesuffix(".pth.tar")
        suffix = last.name[len(stem) :]
        self.last = last
        self.previous, self.best = (last.with_name(f"{stem}_{which}{suffix}") for which in ("previous", "best_loss"))

    def save(self, state: dict, best: bool) -> None:
        """Write the last one; best: it is that of the lowest evaluation loss, too.

        Raises:
            OSError: there is no room, for example; what was there before still is.
        """
        fresh = self.last.with_name(self.last.name + ".new")
        write_file(fresh, state)
        try:
            if self.last.exists():
                give_second_name(self.last, self.previous)
            os.replace(fresh, self.last)
        finally:
            fresh.unlink(missing_ok=True)
        if best:
            give_second_name(self.last, self.best)
        sync_folder(self.last.parent)

    def save_best(self, state: dict) -> None:
        """Write that of the lowest evaluation loss alone: it is not yet time for the last."""
        write_file(self.best, state)

    def make_room(self) -> bool:
        """Give up the one before the last; whether there was one."""
        if not self.previous.exists():
            return False
        self.previous.unlink()
        return True

    def newest(self) -> tuple[Path, int] | None:
        """The one of the highest step that can be read, and that step."""
        found = []
        for path in (self.last, self.previous, self.best):
            try:
                found.append((load_file(path)["step"], path))
            except (InputError, KeyError):
                continue
        return max(((path, step) for step, path in found), key=lambda item: item[1], default=None)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Within it the folder is this process's, or until the process ends, however it ends.

    Raises:
        InputError: another run has it, or nothing can be written there.
    """
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(f"--save {folder}: another run is writing there; choose another folder") from error
    except OSError as error:
        raise InputError(f"--save {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


@dataclass
class TrainedModel:
    """A model as its checkpoint describes it, on the CPU, in evaluation mode, its entropy coder's tables made.

    Attributes:
        model: the module.
        path: the checkpoint.
        architecture: its name in CompressAI's registry, or FILE.py:CLASS.
        options: train_lic.py's for this run ("lmbda", "metric", "seed", ...), empty for other checkpoints.
        optimizer: "soap", "adam", .. or "" where the checkpoint does not say.
        step: steps trained, 0 where the checkpoint does not say.
    """

    model: CompressionModel
    path: Path
    architecture: str
    options: dict
    optimizer: str
    step: int


def load_trained(path: Path | str, architecture: str | None = None, arguments: dict | None = None) -> TrainedModel:
    """The trained model of a checkpoint of train_lic.py, or of CompressAI's train.py (or bare weights), which do not say what
    model they are: `architecture` does. The widths of CompressAI's models are read off the weights; a model from a file is
    built with the keyword arguments `arguments` (default: none, its own defaults).

    Raises:
        InputError: the file cannot be read, says no architecture and none is given, or does not fit it.
    """
    path = Path(path)
    state = load_file(path)
    weights = state.get("state_dict", state)
    options = state["options"] if is_ours(state) else {}
    name = architecture or options.get("model")
    if not name:
        raise InputError(
            f"{path} does not say which model it holds: give its --architecture (one of {', '.join(image_models())})"
        )
    name = resolve_model(name)
    if not isinstance(weights, dict):
        raise InputError(f"{path} does not hold a {name}: its state_dict is a {type(weights).__name__}")
    # DataParallel's and DDP's prefix, with which several authors publish their weights.
    weights = {str(key).removeprefix("module."): value for key, value in weights.items()}
    try:
        if options and name == options["model"]:
            model = build_model(name, options["widths"])
            model.load_state_dict(weights)
        elif IN_A_FILE.fullmatch(name):  # (from_state_dict of such a class does not know what it was built with)
            model = build_model(name, arguments or {})
            model.load_state_dict(weights)
        else:
            model = image_models()[name].from_state_dict(weights)
    except (KeyError, RuntimeError, AttributeError, ValueError, TypeError) as error:
        raise InputError(f"{path} does not hold a {name}: {one_line(error)}") from error
    model.update(force=True)
    return TrainedModel(
        model.eval(), path, name, options, state.get("optimizer_name", "") if options else "", state.get("step", 0)
    )
