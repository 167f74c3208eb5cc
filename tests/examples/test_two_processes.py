"""train_lic.py in several processes."""

import signal
import subprocess
import sys

import lic_training
import pytest
import torch
from lic_data import find_images
from lic_evaluation import evaluate
from lic_images import centre_crop, read_image
from lic_models import build_model
from short_training import SHORT, assert_same, environment, error_line, metrics, options_of

TWO = ["--nnodes", "1", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
PROBE = """
import hashlib, os, signal, sys, time
from pathlib import Path
examples, folder, *rest = sys.argv[1:]
sys.path.insert(0, examples)
import train_lic
rank, runs, stops = int(os.environ["RANK"]), [], []

class Run(train_lic.Run):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        runs.append(self)

    def train_step(self, x):
        values = super().train_step(x)
        if self.options["steps"] == 1000 and self.step == 12 and rank == 0:
            os.kill(os.getppid(), signal.SIGTERM)  # torchrun's process, which tells its processes
            while not stops[-1].signal:
                time.sleep(0.01)
        return values

class StopRequest(train_lic.StopRequest):
    def __enter__(self):
        stops.append(self)
        return super().__enter__()

train_lic.Run, train_lic.StopRequest = Run, StopRequest
train_lic.World.leave = lambda self: None  # several runs in a row
while rest:
    end = rest.index(";")
    status, rest = train_lic.main(rest[:end]), rest[end + 1 :]
    parts = [t.numpy().tobytes() for t in (*runs[-1].model.state_dict().values(), runs[-1].gradients.state_dict()["logits"])]
    states = runs[-1].optimizer.state_dict()["state"].values()
    parts += [t.numpy().tobytes() for state in states for t in state.values() if hasattr(t, "numpy")]
    with Path(folder, f"rank{rank}").open("a") as file:
        print(status, hashlib.sha256(b"".join(parts)).hexdigest(), file=file, flush=True)
sys.exit(status)
"""


@pytest.mark.slow
def test_two_processes(tmp_path, photos, examples):
    """They end with equal weights and optimizer states, to the bit those of a run that was resumed half way; one alone speaks
    and writes; what they say of the model is what one process says. SIGTERM to torchrun leaves the checkpoint that a run of so
    many steps leaves. With famo, whose weights of the two terms are of the whole batch too."""
    part, resumed, whole, stopped = (tmp_path / name for name in ("part", "resumed", "whole", "stopped"))
    begin = [*SHORT, "--dataset", str(photos), "--bitstreams", "none", "--eval-every", "100", "--gradients", "famo"]
    commands = [
        [*begin, "--steps", "12", "--save", str(part)],
        ["--resume", str(part / "checkpoint.pth.tar"), "--steps", "22", "--save", str(resumed)],
        [*begin, "--steps", "22", "--save", str(whole)],
        [*begin, "--steps", "1000", "--save", str(stopped)],
    ]
    (tmp_path / "probe.py").write_text(PROBE)
    arguments = [argument for command in commands for argument in (*command, ";")]
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *TWO, tmp_path / "probe.py", examples, tmp_path, *arguments],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.stdout.count("Results are in") == 3, process.stdout + process.stderr
    assert process.stdout.count("stopped at step 12 of 1000 (SOAP)") == 1
    first, second = ((tmp_path / f"rank{rank}").read_text().splitlines() for rank in (0, 1))
    assert first == second
    assert [line.split()[0] for line in first] == ["0", "0", "0", str(128 + signal.SIGTERM)]
    assert first[1] == first[2] and first[0].split()[1] == first[3].split()[1]

    saved = {path: torch.load(path / "checkpoint.pth.tar", weights_only=True) for path in (part, resumed, whole, stopped)}
    for a, b in ((part, stopped), (resumed, whole)):
        for key in ("state_dict", "rngs", "step", "schedule", "gradients"):
            assert_same(saved[a][key], saved[b][key])
        assert_same(saved[a]["optimizer"]["state"], saved[b]["optimizer"]["state"])
    own, others = saved[stopped]["windows"]  # of the two steps since the last row
    assert len(own) == len(others) == 2 and own[0]["loss"] != others[0]["loss"]
    assert not saved[whole]["rngs"][0].equal(saved[whole]["rngs"][1])  # noise of their own
    assert [(row["split"], row["step"]) for row in metrics(whole)] == [
        ("train", "10"), ("train", "20"), ("train", "22"), ("eval", "22")
    ]  # fmt: skip

    model = build_model("bmshj2018-hyperprior", {"N": 8, "M": 12})
    model.load_state_dict(saved[whole]["state_dict"])
    images = [centre_crop(read_image(file), (64, 64)) for file in find_images(photos / "test")]
    alone = evaluate(model, lic_training.Run(options_of(), "soap", 1e-3).criterion, images)
    assert {key: saved[whole]["history"][-1][key] for key in alone} == pytest.approx(alone, rel=1e-6)


def test_a_batch_that_cannot_be_shared(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--batch-size 3 cannot be shared equally by 2 processes" in error_line(capsys, ["--batch-size", "3"])
