"""Checkpoints on disk: reading train_lic.py's, and trained models from them or from CompressAI's own."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from compressai.models import CompressionModel
from lic_data import InputError
from lic_models import build_model, image_models


def load_file(path: Path) -> dict:
    """What torch.save wrote there: plain containers and tensors, on the CPU; never code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
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
        raise InputError(f"{path} is not a checkpoint of this script")
    return state


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


def load_trained(path: Path | str, architecture: str | None = None) -> TrainedModel:
    """The trained model of a checkpoint of train_lic.py, or of CompressAI's train.py (or bare weights), which do not say what
    model they are: `architecture` does, and their widths are read off the weights.

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
            f"{path} does not say which model it holds: give its architecture (one of {', '.join(image_models())})"
        )
    try:
        if options and name == options["model"]:
            model = build_model(name, options["widths"])
            model.load_state_dict(weights)
        else:
            model = image_models()[name].from_state_dict(weights)
    except (KeyError, RuntimeError, AttributeError, ValueError, TypeError) as error:
        raise InputError(f"{path} does not hold a {name}: {str(error).strip().splitlines()[0]}") from error
    model.update(force=True)
    return TrainedModel(
        model.eval(), path, name, options, state.get("optimizer_name", "") if options else "", state.get("step", 0)
    )
