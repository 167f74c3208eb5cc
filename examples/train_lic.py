#!/usr/bin/env python
"""Train a learned image compression model of CompressAI with SOAP.

Without arguments: a small scale hyperprior on the photographs beside this script, a few minutes on two CPU cores.
Everything is written to runs/<name>/: a checkpoint that CompressAI's eval_model reads, metrics.csv, eval-*.json in
CompressAI's layout, curve.png and reconstructions.png.
"""

import csv
import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path

# CompressAI imports torch_geometric, which still decorates with torch.jit.script: nothing that a user here can act on.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)

# ruff: noqa: E402
from lic_arguments import CHECKPOINT, LEARNING_RATES, STEPS, make_parser, parse_options
from lic_checkpoint import read_checkpoint
from lic_data import InputError, RandomCrops, centre_crop, find_dataset, read_image
from lic_evaluation import MS_SSIM_SIDE, code_image, jpeg_at, mean_results, psnr, to_float, write_eval_json
from lic_models import build_model, downsampling_factor
from lic_plots import plot_curves, plot_reconstructions
from lic_training import OPTIMIZERS, Run, StopRequest, describe
from torch import Tensor
from tqdm import tqdm

PHOTOS = Path(__file__).resolve().parent / "photos"
PICTURES = 3  # rows of reconstructions.png


def load_images(options: dict) -> tuple[RandomCrops, list[Tensor], list[Tensor]]:
    """Training crops, evaluation crops and whole evaluation images. Fills in options["steps"]."""
    train_files, eval_files = find_dataset(Path(PHOTOS if options["dataset"] is None else options["dataset"]))
    height, width = (options["patch_size"] * 2)[:2]
    multiple = downsampling_factor(build_model(options["model"], options["widths"]))
    if height % multiple or width % multiple:
        raise InputError(f"--patch-size {width} x {height}: {options['model']} needs multiples of {multiple}")
    if options["metric"] == "ms-ssim" and min(height, width) <= MS_SSIM_SIDE:
        raise InputError(f"--metric ms-ssim needs a --patch-size above {MS_SSIM_SIDE}, not {width} x {height}")
    crops = RandomCrops(train_files, (height, width), options["seed"])
    whole = [read_image(file) for file in eval_files]
    eval_crops = [centre_crop(image, options["eval_crop"]) for image in whole]
    for file, image in zip(eval_files, eval_crops, strict=True):
        if options["metric"] == "ms-ssim" and min(image.shape[-2:]) <= MS_SSIM_SIDE:
            raise InputError(
                f"--metric ms-ssim needs evaluation images above {MS_SSIM_SIDE} pixels: {file} is evaluated on "
                f"{image.shape[-1]} x {image.shape[-2]}"
            )
    if options["epochs"]:
        options["steps"] = -(-options["epochs"] * len(train_files) // options["batch_size"])
    options["steps"] = options["steps"] or STEPS
    return crops, eval_crops, whole


def choose_folder(options: dict) -> Path:
    """The run's folder, made; never one that already holds a run, unless that is the run being resumed."""
    if options["save"]:
        folder = Path(options["save"])
        resumes = options["resume"] and folder.resolve() == Path(options["resume"]).parent.resolve()
        if (folder / CHECKPOINT).exists() and not resumes:
            raise InputError(f"--save {folder} already holds a run; --resume {folder / CHECKPOINT}, or choose another")
    else:
        first = Path("runs") / f"{options['model']}-{options['optimizer']}"
        folder, number = first, 1
        while folder.exists():
            number += 1
            folder = first.with_name(f"{first.name}-{number}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--save {folder}: {error.strerror}") from error
    return folder


def write_metrics(path: Path, runs: list[Run]) -> None:
    """Every row of every run. Splits: train (means over the steps since the last row), eval (evaluation crops) and
    bitstream (whole evaluation images, coded: bpp is actual, bpp_estimated the likelihoods' for the same images)."""
    columns = ["optimizer", "split", "step", "seconds", "learning_rate", "loss", "bpp", "psnr", "mse", "aux_loss",
               "bpp_estimated"]  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for run in runs:
            writer.writerows(run.history)


def write_results(folder: Path, options: dict, runs: list[Run], whole: list[Tensor]) -> None:
    """Code the whole evaluation images with every run's model; write metrics.csv, eval-*.json and the pictures."""
    pictured = range(0, len(whole), -(-len(whole) // PICTURES))
    columns = []  # of the picture: per run {image index: (caption, decoded image)}
    rates = {}  # image index -> bpp of the first run, which JPEG is to match
    for run in runs:
        label, model = OPTIMIZERS[run.optimizer_name], run.entropy_coding_model()
        results, column = [], {}
        for i, image in enumerate(tqdm(whole, desc=f"{label}: bitstreams", unit="image", leave=False)):
            result, x_hat = code_image(model, image)
            results.append(result)
            if i in pictured:
                rates.setdefault(i, result["bpp"])
                column[i] = (f"{label}: {result['bpp']:.2f} bpp, {result['psnr-rgb']:.1f} dB", x_hat)
        columns.append(column)
        report_bitstreams(run, results)
        name = f"{options['model']}-{options['metric']}-{run.optimizer_name}"
        write_eval_json(folder / f"eval-{run.optimizer_name}.json", name, mean_results(results))
    write_metrics(folder / "metrics.csv", runs)

    rows = []
    for i in pictured:
        jpeg, bpp = jpeg_at(whole[i], rates[i])
        original = to_float(whole[i])
        caption = f"JPEG: {bpp:.2f} bpp, {psnr(original, jpeg):.1f} dB"
        rows.append([("original", original), *(column[i] for column in columns), (caption, jpeg)])
    plot_reconstructions(folder / "reconstructions.png", rows)
    labels = {run.optimizer_name: OPTIMIZERS[run.optimizer_name] for run in runs}
    title = f"{options['model']} ({', '.join(f'{k} = {v}' for k, v in options['widths'].items())}), "
    title += f"$\\lambda$ = {options['lmbda']:g}, {options['metric']}, batches of {options['batch_size']}"
    plot_curves(folder / "curve.png", {run.optimizer_name: run.history for run in runs}, labels, title)


def report_bitstreams(run: Run, results: list[dict[str, float]]) -> None:
    """Say what the bitstreams came to, and keep it in the run's history."""
    label, mean = OPTIMIZERS[run.optimizer_name], mean_results(results)
    print(
        f"{label}: {len(results)} whole images coded and decoded: {mean['bpp']:.3f} bpp "
        f"(estimated from the likelihoods: {mean['bpp-estimated']:.3f}), {mean['psnr-rgb']:.2f} dB"
    )
    worst = max(abs(result["psnr-rgb"] - result["psnr-forward"]) for result in results)
    if worst > 0.5:
        print(f"{label}: warning: the decoder's PSNR is up to {worst:.2f} dB off the forward pass's", file=sys.stderr)
    run.record("bitstream", None, {"bpp": mean["bpp"], "bpp_estimated": mean["bpp-estimated"], "psnr": mean["psnr-rgb"]})


def summarise(run: Run, other: Run) -> str:
    """When `run` reached the evaluation loss that `other` ended with, in steps and in training time."""
    label, name = OPTIMIZERS[run.optimizer_name], OPTIMIZERS[other.optimizer_name]
    goal = other.evaluations()[-1]
    last = run.evaluations()[-1]
    for row in run.evaluations():
        if row["loss"] <= goal["loss"]:
            steps, seconds = (100 * (1 - row[key] / goal[key]) for key in ("step", "seconds"))
            time = f"{seconds:.0f} % less time" if seconds >= 0 else f"{-seconds:.0f} % more time"
            return (
                f"{label} reached {name}'s final evaluation loss ({goal['loss']:.3f}) at step {row['step']} of "
                f"{goal['step']} ({steps:.0f} % fewer steps, {time})"
            )
    return (
        f"{label} did not reach {name}'s final evaluation loss: {last['loss']:.3f} against {goal['loss']:.3f} after "
        f"{last['step']} steps"
    )


def keep_checkpoint(options: dict, kept: Path) -> None:
    """A resumed run that has nothing left to train: its checkpoint stands beside its new results too."""
    if not kept.exists():
        shutil.copyfile(Path(options["resume"]).with_name(kept.name), kept)


def how_to_resume(folder: Path) -> str:
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), "--resume", str(folder / CHECKPOINT)])
    return f"checkpoint saved; to resume:\n  {command}"


def train(options: dict, state: dict | None) -> int:
    """Train what the options ask for and write the results. Returns the exit status."""
    crops, eval_crops, whole = load_images(options)
    folder = choose_folder(options)
    options["save"] = str(folder)
    print(f"{len(crops.files)} images to train on, {len(whole)} to evaluate on, {options['steps']} steps; {folder}/")

    plan = [(options["optimizer"], options["learning_rate"], CHECKPOINT, state)]
    if other := options["compare"]:
        name = f"checkpoint-{other}.pth.tar"
        beside = Path(options["resume"]).with_name(name) if state else None
        other_state = read_checkpoint(beside) if beside and beside.exists() else None
        plan.append((other, options["compare_learning_rate"], name, other_state))
    runs = []
    for optimizer, learning_rate, name, start in plan:
        run = Run(options, optimizer, learning_rate or LEARNING_RATES[optimizer])
        runs.append(run)
        if start:
            run.load(start)
        if run.step > options["steps"]:
            raise InputError(f"{options['steps']} steps: the checkpoint is already at step {run.step}")
        if run.step == options["steps"]:
            keep_checkpoint(options, folder / name)
        else:
            with StopRequest() as stop:
                run.train(crops, eval_crops, options["steps"], stop, folder / name)
            if stop.signal:
                write_metrics(folder / "metrics.csv", runs)
                print(f"stopped at step {run.step} of {options['steps']} ({OPTIMIZERS[optimizer]})")
                print(how_to_resume(folder))
                return 128 + stop.signal
    try:
        write_results(folder, options, runs, whole)
    except KeyboardInterrupt:
        print(f"stopped after training, before all results were written\n{how_to_resume(folder)}")
        return 130
    for run in runs:
        row = describe(run.evaluations()[-1])
        print(
            f"{OPTIMIZERS[run.optimizer_name]}: evaluation loss {row} after {run.step} steps, {run.seconds:.0f} s of training"
        )
    if len(runs) == 2:
        print(summarise(*runs))
    print(f"Results are in {folder}/")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    try:
        return train(*parse_options(parser, sys.argv[1:] if argv is None else argv))
    except InputError as error:
        # One raised in a loader's worker arrives with that process's traceback in front of it.
        parser.error(str(error).strip().splitlines()[-1].removeprefix("lic_data.InputError: "))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
