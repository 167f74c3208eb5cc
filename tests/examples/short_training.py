"""Short runs of train_lic.py, and what they leave."""

import csv
import os
from pathlib import Path

import pytest
import torch
import train_lic
from lic_arguments import parse_options
from lic_parser import make_parser

TINY = ["--N", "8", "--M", "12", "--batch-size", "2", "--eval-crop", "128", "192"]
SHORT = [*TINY[:-3], "--eval-crop", "64", "64", "--schedule", "constant", "--warmup-steps", "2"]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def error_line(capsys, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        train_lic.main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("train_lic.py: error: ") and captured.err.count("\n") == 1
    return captured.err


def arguments(photos: Path, folder: Path, *more: str) -> list[str]:
    return [*TINY, "--dataset", str(photos), "--save", str(folder), "--bitstreams", "none", *more]


def options_of(*arguments: str) -> dict:
    options, _ = parse_options(make_parser(""), [*SHORT, *arguments])
    return options | {"steps": options["steps"] or 10}


def train(folder: Path, photos: Path, *more: str) -> dict:
    """Train and return the checkpoint. One thread, few channels, small crops."""
    assert train_lic.main([*SHORT, "--dataset", str(photos), "--save", str(folder), "--bitstreams", "none", *more]) == 0
    return torch.load(folder / "checkpoint.pth.tar", weights_only=True)


def assert_resumes_to_the_bit(tmp_path: Path, photos: Path, *more: str, steps: int = 6, stop: int = 3) -> dict:
    """`steps` steps are `stop` of them, a checkpoint, and the rest. Returns the whole run's checkpoint."""
    whole = train(tmp_path / "whole", photos, "--eval-every", str(stop), *more, "--steps", str(steps))
    train(tmp_path / "part", photos, "--eval-every", str(stop), *more, "--steps", str(stop))
    path = tmp_path / "part" / "checkpoint.pth.tar"
    torch.rand(7)  # noise goes on from the checkpoint, not from here
    assert train_lic.main(["--resume", str(path), "--steps", str(steps)]) == 0
    part = torch.load(path, weights_only=True)
    assert part["step"] == whole["step"] == steps
    for key in ("state_dict", "unaveraged", "rng", "gradients", "schedule"):
        assert_same(whole[key], part[key])
    assert_same(whole["optimizer"]["state"], part["optimizer"]["state"])
    rates = [[group["lr"] for group in state["optimizer"]["param_groups"]] for state in (whole, part)]
    assert rates[0] == rates[1]
    losses = [[row["loss"] for row in state["history"] if row["split"] == "eval"] for state in (whole, part)]
    assert losses[0] == losses[1]
    return whole


def assert_same(a, b) -> None:
    """Nested containers of tensors and plain values, to the bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for pair in zip(a, b):
            assert_same(*pair)
    else:
        assert a == b
