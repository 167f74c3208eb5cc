"""examples/train_lic.py as its user meets it: real photographs, CompressAI's models, a few steps."""

import json
import signal
import subprocess
import sys
import time

import lic_optimizers
import lic_training
import pytest
import torch
import train_lic
from PIL import Image
from short_training import TINY, environment, error_line, metrics, weights

import soap_opt

CSV_COLUMNS = (
    "optimizer,split,step,seconds,learning_rate,loss,bpp,psnr,mse,aux_loss,bpp_estimated,skipped_steps,skipped_refreshes,"
    "raw,raw_shared,preconditioned,preconditioned_shared,between_steps"
)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["elic2022-official", "elic2022-chandelier"])
def test_models_whose_gradients_are_degenerate(model, tmp_path):
    """As their users start them. Both died within 10 steps when a refresh divided by subnormal numbers."""
    folder = tmp_path / model
    assert train_lic.main(["--model", model, "--steps", "20", "--save", str(folder)]) == 0
    losses = [float(row["loss"]) for row in metrics(folder) if row["split"] == "train"]
    assert all(loss < float("inf") for loss in losses) and losses[-1] < losses[0]
    saved = weights(folder / "checkpoint.pth.tar").values()
    assert all(weight.isfinite().all() for weight in saved if weight.is_floating_point())


@pytest.mark.slow
def test_no_arguments_but_the_length(tmp_path, examples):
    """Default model, photographs and folder, as a command in another directory."""
    done = subprocess.run(
        [sys.executable, examples / "train_lic.py", "--steps", "12", "--eval-every", "6"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "SOAP step    12: evaluation loss" in done.stdout + done.stderr
    assert done.stderr == ""  # no progress bar where there is no terminal

    folder = tmp_path / "runs" / "bmshj2018-hyperprior-soap"
    names = [".lock", "checkpoint.pth.tar", "checkpoint_best_loss.pth.tar", "curve.png", "eval-soap.json", "metrics.csv",
             "reconstructions.png"]  # fmt: skip
    assert sorted(file.name for file in folder.iterdir()) == names
    assert (folder / "metrics.csv").read_text().splitlines()[0] == CSV_COLUMNS
    rows = metrics(folder)
    assert [(row["split"], row["step"]) for row in rows] == [
        ("eval", "6"), ("train", "10"), ("train", "12"), ("eval", "12"), ("bitstream", "12")
    ]  # fmt: skip
    layout = json.loads((folder / "eval-soap.json").read_text())
    assert layout.keys() == {"name", "description", "results"}
    assert layout["results"].keys() == {"psnr-rgb", "ms-ssim-rgb", "bpp", "encoding_time", "decoding_time"}
    assert layout["results"]["bpp"] == [float(rows[-1]["bpp"])]
    assert 0.8 < float(rows[-1]["bpp"]) / float(rows[-1]["bpp_estimated"]) < 1.25
    assert Image.open(folder / "curve.png").size[0] > 1000
    assert Image.open(folder / "reconstructions.png").size[0] > 3 * 512


@pytest.mark.slow
def test_compressais_eval_model_agrees(tmp_path, photos):
    """CompressAI's own evaluation of the checkpoint finds the sizes and PSNRs that the script wrote."""
    folder = tmp_path / "run"
    assert train_lic.main([*TINY, "--dataset", str(photos), "--steps", "30", "--save", str(folder)]) == 0
    command = ["-m", "compressai.utils.eval_model", "checkpoint", photos / "test", "-a", "bmshj2018-hyperprior"]
    done = subprocess.run(
        [sys.executable, *command, "-p", folder / "checkpoint.pth.tar"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    theirs = json.loads(done.stdout)["results"]
    ours = json.loads((folder / "eval-soap.json").read_text())["results"]
    assert theirs["bpp"] == ours["bpp"]
    assert theirs["psnr-rgb"] == pytest.approx(ours["psnr-rgb"], abs=1e-3)
    assert theirs["ms-ssim-rgb"] == pytest.approx(ours["ms-ssim-rgb"], abs=1e-4)


@pytest.mark.slow
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, photos, examples, capsys):
    """SIGINT ends the run within a step, with a checkpoint and the command to resume; resumed, it ends with the same
    bits as a run that nobody stopped."""
    options = [*TINY, "--dataset", str(photos), "--schedule", "constant", "--eval-every", "50"]
    stopped, whole = tmp_path / "stopped run", tmp_path / "whole"
    process = subprocess.Popen(  # so many steps that the signal always comes before the last
        [sys.executable, examples / "train_lic.py", *options, "--steps", "100000", "--save", stopped],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (stopped / "metrics.csv").exists() or len(metrics(stopped)) == 0:  # the first ten steps are done
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    step = torch.load(stopped / "checkpoint.pth.tar", weights_only=True)["step"]
    assert step >= 10
    assert f"stopped at step {step} of 100000 (SOAP)" in stdout
    command = stdout.strip().splitlines()[-1].strip()
    assert command.startswith("python ") and command.endswith(f"train_lic.py --resume '{stopped}/checkpoint.pth.tar'")
    assert metrics(stopped)[-1]["step"] == str(step // 10 * 10)  # the steps since then are kept for the row of all ten

    # The data come from another number of processes: that must not matter either.
    length = ["--steps", str(step + 20)]
    assert train_lic.main(["--resume", str(stopped / "checkpoint.pth.tar"), *length, "--num-workers", "1"]) == 0
    assert train_lic.main([*options, *length, "--save", str(whole)]) == 0
    a, b = (torch.load(folder / "checkpoint.pth.tar", weights_only=True) for folder in (stopped, whole))
    assert a["step"] == b["step"] == step + 20
    torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    torch.testing.assert_close(a["aux_optimizer"]["state"], b["aux_optimizer"]["state"], rtol=0, atol=0)
    evaluations = [[row["loss"] for row in metrics(f) if row["split"] == "eval"] for f in (stopped, whole)]
    assert evaluations[0] == evaluations[1]
    assert "Results are in" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_resume_with_more_steps(tmp_path, photos, schedule):
    """A finished run goes on when given more --steps; with a constant learning rate it is as if it had always had them."""
    options = [*TINY, "--dataset", str(photos), "--schedule", schedule, "--warmup-steps", "3"]
    short, long = tmp_path / "short", tmp_path / "long"
    assert train_lic.main([*options, "--steps", "5", "--save", str(short)]) == 0
    assert train_lic.main(["--resume", str(short / "checkpoint.pth.tar"), "--steps", "10"]) == 0
    assert train_lic.main([*options, "--steps", "10", "--save", str(long)]) == 0
    a, b = weights(short / "checkpoint.pth.tar"), weights(long / "checkpoint.pth.tar")
    assert all(a[name].equal(b[name]) for name in a) == (schedule == "constant")
    steps = [row["step"] for row in metrics(short) if row["split"] == "eval"]
    assert steps == ["5", "10"]
    assert [row["split"] for row in metrics(short)].count("bitstream") == 1


@pytest.mark.slow
def test_compare(tmp_path, photos, capsys):
    folder = tmp_path / "run"
    options = [*TINY, "--dataset", str(photos), "--steps", "20", "--eval-every", "10", "--save", str(folder)]
    assert train_lic.main([*options, "--compare", "adam", "--compare-learning-rate", "2e-3"]) == 0
    rows = metrics(folder)
    for optimizer, rate in (("soap", 3e-3), ("adam", 2e-3)):
        own = [row for row in rows if row["optimizer"] == optimizer]
        assert [row["step"] for row in own if row["split"] == "eval"] == ["10", "20"]
        assert float(own[0]["learning_rate"]) == pytest.approx(rate * 10 / 50)  # warm-up
        assert (folder / f"eval-{optimizer}.json").exists()
    names = {"checkpoint.pth.tar", "checkpoint-adam.pth.tar", "curve.png", "reconstructions.png", "metrics.csv"}
    assert names <= {file.name for file in folder.iterdir()}
    assert Image.open(folder / "reconstructions.png").size[0] > 4 * 512  # Adam's column beside SOAP's
    assert "Adam's final evaluation loss" in capsys.readouterr().out

    # Both go on from their own checkpoints.
    assert train_lic.main(["--resume", str(folder / "checkpoint.pth.tar"), "--steps", "30"]) == 0
    rows = [(row["optimizer"], row["step"]) for row in metrics(folder) if row["split"] == "eval"]
    assert rows == [(optimizer, step) for optimizer in ("soap", "adam") for step in ("10", "20", "30")]
    capsys.readouterr()

    with pytest.raises(SystemExit):
        train_lic.main(["--resume", str(folder / "checkpoint-adam.pth.tar")])
    assert "resume the checkpoint.pth.tar beside it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "other"), [("soap", "adam"), ("sgd", None)])
def test_the_implementation_belongs_to_the_run(tmp_path, photos, capsys, optimizer, other):
    """Both optimizers get it, the checkpoint keeps it, and a resumed run goes on with it."""
    folder = tmp_path / "run"
    options = [*TINY, "--dataset", str(photos), "--steps", "2", "--optimizer", optimizer, "--save", str(folder), "--foreach"]
    assert train_lic.main([*options, *(["--compare", other] if other else [])]) == 0
    checkpoint = folder / "checkpoint.pth.tar"
    assert train_lic.main(["--resume", str(checkpoint), "--steps", "4"]) == 0
    for path in [checkpoint, *([folder / f"checkpoint-{other}.pth.tar"] if other else [])]:
        saved = torch.load(path, weights_only=True)
        assert saved["step"] == 4 and saved["options"]["foreach"] and not saved["options"]["fused"]
        group = saved["optimizer"]["param_groups"][0]
        assert group["foreach"] and not group["fused"]
    capsys.readouterr()
    message = error_line(capsys, ["--resume", str(checkpoint), "--fused", "--steps", "6"])
    assert "--fused True differs from the checkpoint's False" in message


@pytest.mark.slow
def test_a_checkpoint_from_before_there_was_a_choice(tmp_path, photos):
    folder = tmp_path / "run"
    assert train_lic.main([*TINY, "--dataset", str(photos), "--steps", "2", "--save", str(folder)]) == 0
    saved = torch.load(folder / "checkpoint.pth.tar", weights_only=True)
    del saved["options"]["fused"], saved["options"]["foreach"]
    torch.save(saved, folder / "checkpoint.pth.tar")
    assert train_lic.main(["--resume", str(folder / "checkpoint.pth.tar"), "--steps", "3"]) == 0


def test_an_implementation_that_is_not_to_be_had(tmp_path, photos, capsys, monkeypatch):
    arguments = [*TINY, "--dataset", str(photos), "--steps", "2", "--save", str(tmp_path / "run"), "--fused"]
    monkeypatch.setattr(soap_opt._ext, "unavailable", lambda device_type: "there is no engine today")
    assert "--fused: " in (message := error_line(capsys, arguments)) and "there is no engine today" in message
    monkeypatch.undo()
    monkeypatch.setitem(lic_optimizers.REGISTRY, "SOAP", lambda params, lr: None)
    assert "--fused: SOAP has no such implementation" in error_line(capsys, arguments)


def history(optimizer: str, rows: list[tuple[int, float, float]]) -> lic_training.Run:
    run = lic_training.Run.__new__(lic_training.Run)
    run.optimizer_name = optimizer
    run.history = [{"split": "eval", "step": step, "seconds": seconds, "loss": loss} for step, seconds, loss in rows]
    return run


def test_summary_says_who_was_first():
    adam = history("adam", [(100, 10.0, 6.0), (200, 20.0, 5.0)])
    fast, slow = history("soap", [(100, 15.0, 4.9), (200, 30.0, 4.0)]), history("soap", [(100, 15.0, 7.0), (200, 30.0, 5.5)])
    late = history("soap", [(100, 15.0, 6.0), (200, 30.0, 4.5)])
    assert train_lic.summarise(fast, adam) == (
        "SOAP reached Adam's final evaluation loss (5.000) at step 100 of 200 (50 % fewer steps, 25 % less time)"
    )
    assert "(0 % fewer steps, 50 % more time)" in train_lic.summarise(late, adam)
    assert train_lic.summarise(slow, adam) == (
        "SOAP did not reach Adam's final evaluation loss: 5.500 against 5.000 after 200 steps"
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mbt2018", "cheng2020-attn", "elic2022-official", "bmshj2018-hyperprior-vbr"])
def test_whole_runs_of_other_models(tmp_path, photos, model):
    """Autoregressive, checkerboard and variable-rate models go all the way to their bitstreams and pictures."""
    widths = ["--N", "8"] + ([] if model.startswith("cheng") else ["--M", "20"])
    options = ["--model", model, *widths, "--batch-size", "2", "--steps", "3", "--dataset", str(photos)]
    assert train_lic.main([*options, "--save", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "reconstructions.png").exists()
    bitstream = metrics(tmp_path / "run")[-1]
    assert bitstream["split"] == "bitstream" and float(bitstream["bpp"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--metric", "ms-ssim", "--patch-size", "192"], ["--amp"], ["--optimizer", "sgd"]])
def test_whole_runs_of_other_options(tmp_path, photos, options):
    length = ["--epochs", "2", "--dataset", str(photos), "--save", str(tmp_path / "run")]
    assert train_lic.main([*TINY, "--eval-crop", "0", "0", *options, *length]) == 0
    assert metrics(tmp_path / "run")[-1]["step"] == "6"  # two passes over six images, two at a time


# ---- bad input: one line, exit status 2 ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "jpeg"], "--model jpeg: choose from bmshj2018-factorized, "),
        (["--optimizer", "lion"], "argument --optimizer: invalid choice: 'lion'"),
        (["--learning-rate", "-1"], "argument -lr/--learning-rate: -1 is not above 0"),
        (["--batch-size", "two"], "argument --batch-size: invalid int value: 'two'"),
        (["--clip-max-norm", "nan"], "argument --clip-max-norm/--clip_max_norm: nan is below 0 or not finite"),
        (["--steps", "5", "--epochs", "5"], "not allowed with argument --steps"),
        (["--fused", "--foreach"], "argument --foreach: not allowed with argument --fused"),
        (["--patch-size", "72"], "--patch-size 72 x 72: bmshj2018-hyperprior needs multiples of 64"),
        (["--patch-size", "64", "64", "3"], "--patch-size takes one or two numbers"),
        (["--metric", "ms-ssim"], "--metric ms-ssim needs a --patch-size above 160, not 64 x 64"),
        (["--metric", "ms-ssim", "--patch-size", "192", "--eval-crop", "128", "0"], "needs evaluation images above 160"),
        (["--model", "/nowhere/x.py:Model"], "--model /nowhere/x.py:Model: there is no file /nowhere/x.py"),
        (["--model-args", "depth=3"], "--model-args depth: bmshj2018-hyperprior has N, M"),
        (["--eval-dataset", "/nowhere"], "--eval-dataset /nowhere is not a folder"),
        (["--quality", "3", "--N", "8"], "--quality sets the widths: give it, or --N/--M, not both"),
        (["--quality", "9"], "--quality 9: bmshj2018-hyperprior has 1 to 8"),
        (["--model", "elic2022-official", "--quality", "3"], "elic2022-official has no qualities in CompressAI's zoo"),
        (["--model", "cheng2020-attn", "--M", "8"], "--M: cheng2020-attn has only one width, --N"),
        (["--compare", "soap"], "--compare soap: that is --optimizer itself"),
        (["--device", "abacus"], "--device abacus: "),
        (["--device", "meta"], "--device meta: "),
        (["--seed", str(2**63)], "argument --seed: 9223372036854775808 is not below 2^63"),
        (["--dataset", ""], "--dataset is empty"),
        (["--dataset", "/nowhere/at/all"], "--dataset /nowhere/at/all is not a folder"),
        (["--resume", "/nowhere/at/all"], "cannot read the checkpoint /nowhere/at/all: "),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    assert message in error_line(capsys, arguments)


@pytest.mark.slow
def test_bad_checkpoints_and_folders(tmp_path, photos, capsys):
    folder = tmp_path / "run"
    options = [*TINY, "--dataset", str(photos), "--steps", "1", "--save", str(folder)]
    assert train_lic.main(options) == 0
    checkpoint = folder / "checkpoint.pth.tar"
    capsys.readouterr()  # the progress bar
    assert f"--save {folder} already holds a run; --resume {checkpoint}" in error_line(capsys, options)
    message = "--lambda 0.05 differs from the checkpoint's 0.013; leave it out to resume"
    assert message in error_line(capsys, ["--resume", str(checkpoint), "--lambda", "0.05"])
    message = "--learning-rate 0.5 differs from the checkpoint's 0.003; leave it out to resume"
    assert message in error_line(capsys, ["--resume", str(checkpoint), "--learning-rate", "0.5"])

    (tmp_path / "broken").write_bytes(checkpoint.read_bytes()[:5000])
    assert "cannot read the checkpoint" in error_line(capsys, ["--resume", str(tmp_path / "broken")])
    torch.save(weights(checkpoint), tmp_path / "weights")
    assert "is not a checkpoint of this script" in error_line(capsys, ["--resume", str(tmp_path / "weights")])
    (tmp_path / "file").touch()
    assert "Not a directory" in error_line(capsys, [*options[:-1], str(tmp_path / "file" / "run")])


@pytest.mark.slow
def test_a_finished_run_is_resumed_to_be_compared(tmp_path, photos, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    options = [*TINY, "--dataset", str(photos), "--steps", "3", "--patch-size", "64"]
    assert train_lic.main([*options, "--save", str(first)]) == 0
    checkpoint = first / "checkpoint.pth.tar"
    # arguments that say what is in force anyway; the checkpoint goes along, so that this folder can be resumed too
    again = ["--resume", str(checkpoint), "--learning-rate", "3e-3", "--patch-size", "64", "64", "--save", str(second)]
    assert train_lic.main([*again, "--compare", "sgd", "--compare-learning-rate", "1e-4"]) == 0
    kept, trained = (torch.load(path, weights_only=True) for path in (second / "checkpoint.pth.tar", checkpoint))
    torch.testing.assert_close(kept["state_dict"], trained["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(kept["optimizer"]["state"], trained["optimizer"]["state"], rtol=0, atol=0)
    capsys.readouterr()
    resumed = ["--resume", str(second / "checkpoint.pth.tar"), "--compare", "sgd"]
    assert train_lic.main(resumed) == 0
    capsys.readouterr()
    for length in (["--steps", "2"], ["--epochs", "1", "--steps", "1"][2:]):
        assert "the checkpoint is already at step 3" in error_line(capsys, [*resumed, *length])


@pytest.mark.parametrize(
    "options",
    [
        ["--milestones", "3"],
        ["--schedule", "cosine", "--lr-decay", "0.1"],
        ["--schedule", "multistep", "--plateau-patience", "3"],
        ["--quantiles", "bisection", "--aux-learning-rate", "1e-3"],
        ["--compare-learning-rate", "1e-3"],
    ],
)
def test_an_option_without_effect_is_refused(tmp_path, capsys, options):
    assert f"{options[-2]} has an effect with --" in error_line(capsys, [*TINY, "--save", str(tmp_path / "run"), *options])
