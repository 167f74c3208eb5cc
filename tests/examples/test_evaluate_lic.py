"""examples/evaluate_lic.py: curves of real models."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import compressai.utils.eval_model.__main__ as eval_model
import compressai.utils.plot.__main__ as compressai_plot
import evaluate_lic
import lic_data
import lic_evaluation
import lic_models
import numpy as np
import pytest
import torch
import train_lic
from PIL import Image

LAMBDAS = ("0.0035", "0.013", "0.0483", "0.18")


# ---- measuring ----


LAYOUT = {"psnr-rgb", "ms-ssim-rgb", "bpp", "encoding_time", "decoding_time"}


def build(seed: int = 0):
    torch.manual_seed(seed)
    return lic_models.build_model("bmshj2018-hyperprior", {"N": 8, "M": 12})


@pytest.fixture(scope="module")
def images(photos):
    return lic_evaluation.image_set([photos / "test"])


@pytest.fixture
def bare(tmp_path) -> Path:
    """A checkpoint as CompressAI's train.py writes it, of random weights: it does not say what model it is."""
    path = tmp_path / "bare" / "checkpoint_best_loss.pth.tar"
    path.parent.mkdir()
    torch.save({"epoch": 3, "state_dict": build().state_dict(), "loss": 1.0}, path)
    return path


@pytest.fixture(scope="module")
def checkpoints(photos, tmp_path_factory) -> list[Path]:
    """Four lambdas with two optimizers, and another seed of one of them, some steps each."""
    root = tmp_path_factory.mktemp("runs")
    tasks = [(name, lmbda, "0") for name in ("soap", "adam") for lmbda in LAMBDAS] + [("adam", LAMBDAS[0], "1")]
    for name, lmbda, seed in tasks:
        arguments = [
            "--N",
            "8",
            "--M",
            "12",
            "--batch-size",
            "2",
            "--eval-crop",
            "64",
            "64",
            "--steps",
            "3",
            "--seed",
            seed,
            "--bitstreams",
            "none",
        ]
        arguments += [
            "--optimizer",
            name,
            "--lambda",
            lmbda,
            "--dataset",
            str(photos),
            "--save",
            str(root / f"{name}{lmbda}-{seed}"),
        ]
        assert train_lic.main(arguments) == 0
    return sorted(root.glob("*/checkpoint.pth.tar"))


def test_a_curve_of_unlike_training_is_told_of():
    """Seeds that are none: one was trained longer, and faster."""

    def checkpoint(seed: str, step: int, **training) -> evaluate_lic.Checkpoint:
        about = {"architecture": "a", "optimizer": "adam", "widths": {}, "metric": "mse", "lmbda": 0.01, "stored": Path("x")}
        return evaluate_lic.Checkpoint(path=Path(seed), seed=seed, step=step, training=training, **about)

    first = checkpoint("0", 6, learning_rate=1e-3, betas=(0.9, 0.95))
    assert evaluate_lic.unlike([first, checkpoint("1", 6, learning_rate=1e-3, betas=[0.9, 0.95]), checkpoint("2", 6)]) == ""
    other = checkpoint("1", 30, learning_rate=1e-2, betas=[0.9, 0.95])
    assert evaluate_lic.unlike([first, other]) == "steps 6, 30; learning_rate 0.001, 0.01"


def command(folder: Path, photos: Path, *arguments) -> list[str]:
    return [*map(str, arguments), "--images", str(photos / "test"), "--save", str(folder), "--resamples", "20"]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "per_image.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("bitstreams", [True, False])
def test_rate_distortion(images, bitstreams):
    """As a study calls it: one dictionary per image; both rates and qualities agree with what the parts measure."""
    model = build().eval()
    model.update(force=True)
    whole = [lic_data.centre_crop(lic_data.read_image(file), (170, 200)) for file in images.files]
    results = lic_evaluation.rate_distortion(model, whole, bitstreams)
    assert len(results) == 2
    for image, result in zip(whole, results):
        estimate, x_hat = lic_evaluation.estimate_image(model, image)
        assert x_hat.shape == image.shape
        assert result["psnr-rgb"] == pytest.approx(lic_evaluation.psnr(lic_evaluation.to_float(image), x_hat), abs=1e-4)
        assert result["bpp-estimated"] == estimate["bpp"] and 0 < result["ms-ssim-rgb"] < 1
        assert result["bpp"] == pytest.approx(
            estimate["bpp"], rel=0 if not bitstreams else 0.1, abs=2 * 64 / (170 * 200) * bitstreams
        )
        assert ("encoding_time" in result) == bitstreams


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_codecs(images, codec):
    image = lic_data.read_image(images.files[0])
    results = [lic_evaluation.code_with(codec, quality, image) for quality in (10, 50, 90)]
    for key in ("bpp", "psnr-rgb", "ms-ssim-rgb"):
        assert results[0][key] < results[1][key] < results[2][key], key
    if codec == "jpeg":
        decoded, bpp = lic_evaluation.jpeg_at(image, results[1]["bpp"])
        assert bpp == results[1]["bpp"]
        assert lic_evaluation.psnr(lic_evaluation.to_float(image), decoded) == pytest.approx(results[1]["psnr-rgb"])


def test_image_sets(photos, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name, value in (("same.png", 1), (f"only-{folder}.png", 2)):
            Image.new("RGB", (70, 80), (value, 0, 0)).save(tmp_path / folder / name)
    both = lic_evaluation.image_set([tmp_path / "a", tmp_path / "b", tmp_path / "a" / "same.png"])
    assert len(both) == 4 and len(set(both.names)) == 4 and {"only-a", "only-b"} < set(both.names)
    assert lic_evaluation.image_set([tmp_path / "a"]).digest != both.digest
    before = both.digest
    Image.new("RGB", (70, 80), (3, 0, 0)).save(tmp_path / "b" / "only-b.png")
    assert lic_evaluation.image_set([tmp_path / "a", tmp_path / "b"]).digest != before
    for name in ("broken.png", "other.jpg"):
        (tmp_path / "a" / name).write_bytes(b"no image")
    with pytest.raises(lic_data.InputError, match="cannot read .*broken.png as an image: .*; cannot read .*other.jpg"):
        lic_evaluation.image_set([tmp_path / "a"])


def test_measurements_survive_an_interruption(images, tmp_path):
    """The second image fails: the first is kept, and is not measured again."""
    seen, path = [], tmp_path / "stored.json"

    def measure(image):
        seen.append(image.shape)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return {"bpp": float(len(seen))}

    with pytest.raises(KeyboardInterrupt):
        lic_evaluation.measure_stored(path, {}, images, lambda: measure)
    results = lic_evaluation.measure_stored(path, {}, images, lambda: measure)
    assert [r["bpp"] for r in results] == [1, 3] and len(seen) == 3
    assert lic_evaluation.measure_stored(path, {}, images, lambda: pytest.fail("measured again")) == results
    assert [file.name for file in tmp_path.iterdir()] == ["stored.json"]
    path.write_text("{")  # damaged: measured again
    assert len(lic_evaluation.measure_stored(path, {}, images, lambda: measure)) == 2 and len(seen) == 5


# ---- the command ----


@pytest.mark.slow
def test_a_checkpoint_of_compressai(bare, photos, tmp_path, capsys):
    folder = tmp_path / "out"
    arguments = command(folder, photos, bare, "--no-bitstreams", "--classic", "-a")
    assert evaluate_lic.main([*arguments[:-6], "bmshj2018-hyperprior", *arguments[-6:]]) == 0
    assert "| bmshj2018-hyperprior |" in capsys.readouterr().out
    layout = json.loads((folder / "eval-bmshj2018-hyperprior.json").read_text())
    assert layout["description"] == "Inference (entropy-estimation)" and layout["results"].keys() == LAYOUT - {
        "encoding_time",
        "decoding_time",
    }
    torch.save({"state_dict": build(1).state_dict()}, bare)  # other bytes at the same path are measured anew
    before = layout["results"]["psnr-rgb"]
    assert evaluate_lic.main([*arguments[:-6], "bmshj2018-hyperprior", *arguments[-6:]]) == 0
    assert json.loads((folder / "eval-bmshj2018-hyperprior.json").read_text())["results"]["psnr-rgb"] != before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to evaluate: give checkpoints, or --curve"),
        (["BARE"], "does not say which model it holds"),
        (["BARE", "-a", "hyperprior"], "--architecture hyperprior: choose from bmshj2018-factorized, "),
        (["BARE", "-a", "mbt2018"], "does not hold a mbt2018"),
        (["MISSING"], "cannot read the checkpoint"),
        (["PHOTO"], "cannot read the checkpoint"),
        (["BARE", "--images", "MISSING"], "does not exist"),
        (["BARE", "--images", "EMPTY"], "no images below it"),
        (["--curve", "BARE"], "give LABEL=CHECKPOINT,CHECKPOINT,.."),
        (["--curve", "A=BARE", "--curve", "A=BARE"], "--curve A: given twice"),
        (["--curve", "A=EMPTY/*.tar"], "--curve A: no file matches"),
        (["--curve", "JPEG=BARE", "-a", "bmshj2018-hyperprior"], "--curve JPEG: that is a codec's label"),
        (["--curve", "A=BARE,BARE", "-a", "bmshj2018-hyperprior"], "are both A, "),
        (["BARE", "-a", "bmshj2018-hyperprior", "--anchor", "B"], "--anchor B: the curves are bmshj2018-hyperprior, JPEG"),
        (["BARE", "--confidence", "95"], "--confidence 95 is not between 0 and 1"),
        (["BARE", "--device", "tpu"], "--device tpu"),
        (["BARE", "--save", "PHOTO"], "--save "),
        (["NAN", "-a", "bmshj2018-hyperprior"], "cannot be evaluated: g_a.0.weight is not finite"),
    ],
)  # fmt: skip
def test_errors_are_one_line(arguments, message, bare, photos, tmp_path, capsys):
    state = build().state_dict()
    state["g_a.0.weight"][0, 0] = math.nan
    torch.save(state, tmp_path / "nan.pth")
    (tmp_path / "empty").mkdir()
    names = {"BARE": bare, "MISSING": tmp_path / "missing", "EMPTY": tmp_path / "empty", "NAN": tmp_path / "nan.pth",
             "PHOTO": lic_data.find_images(photos / "test")[0]}  # fmt: skip
    given = arguments
    for name, path in names.items():
        given = [argument.replace(name, str(path)) for argument in given]
    defaults = {"--images": photos / "test", "--save": tmp_path / "out"}
    for option, value in defaults.items():
        given += [] if option in given else [option, str(value)]
    with pytest.raises(SystemExit) as stopped:
        evaluate_lic.main(given)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate_lic.py: error: ") and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_curves_of_trained_models(checkpoints, photos, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    capsys.readouterr()
    assert evaluate_lic.main(command(folder, photos, *checkpoints)) == 0
    captured = capsys.readouterr()
    assert (folder / "results.md").read_text(encoding="utf-8").strip() in captured.out and "Traceback" not in captured.err
    assert "| SOAP against Adam " in captured.out and "| Adam against WebP " in captured.out

    summary = json.loads((folder / "summary.json").read_text())
    curves = {curve["label"]: curve for curve in summary["curves"]}
    assert list(curves) == ["Adam", "SOAP", "JPEG", "WebP"] and summary["anchor"] == "Adam"
    assert [point["runs"] for point in curves["SOAP"]["points"]] == [1] * 4
    assert sorted(point["runs"] for point in curves["Adam"]["points"]) == [1, 1, 1, 2]
    table = rows(folder)
    assert len(table) == 2 * (9 + 2 * len(lic_evaluation.CODEC_QUALITIES))
    for name, label in (("adam", "Adam"), ("soap", "SOAP"), ("jpeg", "JPEG"), ("webp", "WebP")):
        results = json.loads((folder / f"eval-{name}.json").read_text())["results"]
        assert results.keys() == LAYOUT and results["bpp"] == sorted(results["bpp"])
        for k, point in enumerate(curves[label]["points"]):
            values = [float(row["psnr"]) for row in table if (row["curve"], row["setting"]) == (label, point["setting"])]
            assert results["psnr-rgb"][k] == pytest.approx(np.mean(values)) == pytest.approx(point["psnr-rgb"])

    # CompressAI's own tools: its plot reads the curves, its evaluation of a checkpoint has the same numbers
    files = [str(folder / f"eval-{name}.json") for name in ("adam", "soap", "jpeg", "webp")]
    for metric in ("psnr", "ms-ssim"):
        compressai_plot.main(["-f", *files, "-m", metric, "-o", str(tmp_path / f"{metric}.png")])
        assert (tmp_path / f"{metric}.png").stat().st_size > 10_000
    one = next(path for path in checkpoints if "soap0.013" in str(path))
    eval_model.main(["checkpoint", str(photos / "test"), "-a", "bmshj2018-hyperprior", "-p", str(one), "-d", str(tmp_path),
                     "-o", "theirs.json"])  # fmt: skip
    theirs = json.loads((tmp_path / "theirs.json").read_text())["results"]
    ours = next(point for point in curves["SOAP"]["points"] if point["setting"] == "lambda 0.013")
    assert theirs["bpp"][0] == pytest.approx(ours["bpp"], rel=1e-6)
    assert theirs["psnr-rgb"][0] == pytest.approx(ours["psnr-rgb"], abs=1e-3)

    # Nothing is measured twice, also under other labels
    for name in ("code_image", "estimate_image"):
        monkeypatch.setattr(evaluate_lic, name, lambda *_: pytest.fail("measured again"))
    groups = [
        f"--curve={label}={checkpoints[0].parent.parent}/{name}0*-0/checkpoint.pth.tar"
        for label, name in (("A", "adam"), ("B", "soap"))
    ]
    assert evaluate_lic.main(command(folder, photos, *groups, "--anchor", "B", "--method", "akima")) == 0
    assert "| A against B " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate_lic.main(command(folder, photos, *checkpoints, f"--curve=X={checkpoints[0]},{checkpoints[0]}"))
    assert "are both X, lambda 0.0035, seed 0" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_started_again(checkpoints, photos, tmp_path, examples):
    folder = tmp_path / "out"
    arguments = [
        sys.executable,
        str(examples / "evaluate_lic.py"),
        *command(folder, photos, *checkpoints[:3], "--classic", "jpeg"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(folder.glob("cache/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; the same command goes on from here" in error
    kept = {
        file: file.stat().st_mtime_ns
        for file in folder.glob("cache/*.json")
        if len(json.loads(file.read_text())["results"]) == 2
    }
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    assert (folder / "rd.png").exists() and not list(folder.glob("cache/*.tmp"))
