#!/usr/bin/env python
"""Train a learned image compression model of CompressAI with SOAP.

Without arguments: a small scale hyperprior on the photographs beside this script, a few minutes on two CPU cores.
Everything is written to runs/<name>/: a checkpoint that CompressAI's eval_model reads, metrics.csv, eval-*.json in
CompressAI's layout, curve.png and reconstructions.png.
"""

import argparse
import csv
import os
import shlex
import sys
import warnings
from pathlib import Path

# CompressAI imports torch_geometric, which still decorates with torch.jit.script: nothing that a user here can act on.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)

# ruff: noqa: E402
import torch
from lic_data import InputError, RandomCrops, centre_crop, find_dataset, read_image
from lic_evaluation import MS_SSIM_SIDE, code_image, jpeg_at, mean_results, psnr, to_float, write_eval_json
from lic_models import DEFAULT_M, DEFAULT_N, build_model, downsampling_factor, image_models, model_widths
from lic_plots import plot_curves, plot_reconstructions
from lic_training import OPTIMIZERS, Run, StopRequest, read_checkpoint
from torch import Tensor
from tqdm import tqdm

PHOTOS = Path(__file__).resolve().parent / "photos"
CHECKPOINT = "checkpoint.pth.tar"
LEARNING_RATES = {"soap": 3e-3, "adam": 1e-3, "sgd": 1e-2}
PICTURES = 3  # rows of reconstructions.png
# What a resumed run may be given anew. Everything else comes from the checkpoint, or the result would be another's.
MAY_CHANGE = {"resume", "save", "num_workers", "device", "steps", "epochs", "compare", "compare_learning_rate"}


def positive(kind):
    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = kind.__name__  # argparse's "invalid int value"
    return parse


def not_negative(kind):
    def parse(text: str):
        value = kind(text)
        if not 0 <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is below 0 or not finite")
        return value

    parse.__name__ = kind.__name__
    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")  # without thirty lines of usage in front of it


def make_parser() -> argparse.ArgumentParser:
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    parser = Parser(
        "train_lic.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument

    add("-m", "--model", default="bmshj2018-hyperprior", metavar="NAME",
        help=f"one of {', '.join(image_models())} (default: %(default)s)")
    add("--quality", type=int, metavar="Q", help="the widths of this quality in CompressAI's zoo, with random weights")
    add("--N", type=positive(int), help=f"channels of the transforms (default: {DEFAULT_N})")
    add("--M", type=positive(int), help=f"channels of the latent, where the model has them (default: {DEFAULT_M})")
    add("-d", "--dataset", metavar="DIR",
        help="train/ and test/ (or eval/) folders of images as CompressAI lays them out, or any folder of images, "
        "searched recursively, of which a tenth is held out (default: the photos beside this script)")
    add("--optimizer", choices=OPTIMIZERS, default="soap", help="for the network's weights (default: %(default)s); the "
        "quantiles of the entropy bottlenecks are always Adam's")
    add("-lr", "--learning-rate", type=positive(float), metavar="LR", help=f"(default: {rates})")
    add("--aux-learning-rate", type=positive(float), default=1e-3, metavar="LR",
        help="of the quantiles (default: %(default)s)")
    add("--lambda", dest="lmbda", type=positive(float), default=0.013, metavar="L",
        help="loss = L * 255^2 * MSE + bpp, or L * (1 - MS-SSIM) + bpp (default: %(default)s)")
    add("--metric", choices=("mse", "ms-ssim"), default="mse", help="distortion in the loss (default: %(default)s)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive(int), help="training steps, one batch each (default: 1500)")
    length.add_argument("-e", "--epochs", type=positive(int), help="instead of --steps: passes over the images, one "
                        "crop of each")
    add("--batch-size", type=positive(int), default=8, help="crops per step (default: %(default)s)")
    add("--patch-size", type=positive(int), nargs="+", default=[64], metavar="PX",
        help="side of the crops, or height and width, in pixels (default: 64)")
    add("--clip-max-norm", "--clip_max_norm", type=not_negative(float), default=1.0, metavar="NORM",
        help="clip the gradient's norm, 0: never (default: %(default)s)")
    add("--schedule", choices=("linear", "cosine", "constant"), default="linear",
        help="of the learning rate after warm-up, over all steps; linear: constant, then down to 0 over the last 30 %% "
        "(default: %(default)s)")
    add("--warmup-steps", type=not_negative(int), default=50, metavar="STEPS",
        help="the learning rate rises linearly for so long (default: %(default)s)")
    add("--eval-every", type=positive(int), default=100, metavar="STEPS",
        help="steps between evaluations (default: %(default)s)")
    add("--eval-crop", type=not_negative(int), nargs=2, default=[256, 384], metavar=("H", "W"),
        help="evaluate on centre crops of at most this size in pixels, 0 0: on whole images (default: 256 384); the "
        "bitstreams at the end are always of whole images")
    add("-n", "--num-workers", type=not_negative(int), default=0,
        help="processes that prepare batches; images that fit into memory need none (default: %(default)s)")
    add("--seed", type=not_negative(int), default=0, help="of the weights, the crops and the quantisation noise "
        "(default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, .. (default: %(default)s)")
    add("--amp", action="store_true", help="mixed precision: bfloat16 on a CPU, float16 with loss scaling on CUDA; the "
        "entropy models stay in float32")
    add("--save", nargs="?", const="", metavar="DIR",
        help="folder for the results (default: the first of runs/MODEL-OPTIMIZER, .. -2, .. that is free)")
    add("--resume", "--checkpoint", metavar="CHECKPOINT",
        help="continue this run with its own arguments, to the same result as if it had never stopped")
    add("--compare", choices=OPTIMIZERS, metavar="OPTIMIZER",
        help="afterwards also train the same initial weights on the same batches with this optimizer (soap, adam or "
        "sgd), and draw both in one curve")
    add("--compare-learning-rate", type=positive(float), metavar="LR", help=f"its learning rate (default: {rates})")
    return parser


def parse_options(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[dict, dict | None]:
    """The run's options, complete, and the checkpoint's contents when it resumes one."""
    not_given = object()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    parsed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, not_given))))
    given = {name: value for name, value in parsed.items() if value is not not_given}
    options = {name: parser.get_default(name) for name in names} | given
    if given.get("dataset"):
        options["dataset"] = given["dataset"] = str(Path(given["dataset"]).resolve())

    state = None
    if options["resume"]:
        state = read_checkpoint(Path(options["resume"]))
        stored = state["options"]
        if state["optimizer_name"] != stored["optimizer"]:
            raise InputError(f"{options['resume']} is the comparison's; resume the {CHECKPOINT} beside it")
        for name, value in given.items():
            if name not in MAY_CHANGE and value != stored[name]:
                flag = "--lambda" if name == "lmbda" else "--" + name.replace("_", "-")
                raise InputError(f"{flag} {value} differs from the checkpoint's {stored[name]}; leave it out to resume")
        if {"steps", "epochs"} & given.keys():
            stored = stored | {"steps": None, "epochs": None}
        options = stored | {name: value for name, value in given.items() if name in MAY_CHANGE}
        options["save"] = options["save"] if given.get("save") else str(Path(options["resume"]).parent)
    if options["model"] not in image_models():
        raise InputError(f"--model {options['model']}: choose from {', '.join(image_models())}")
    options["widths"] = model_widths(options["model"], options["quality"], options["N"], options["M"])
    if len(options["patch_size"]) > 2:
        raise InputError("--patch-size takes one or two numbers")
    if options["compare"] == options["optimizer"]:
        raise InputError(f"--compare {options['compare']}: that is --optimizer itself")
    check_device(options["device"])
    return options, state


def check_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error


def load_images(options: dict) -> tuple[RandomCrops, list[Tensor], list[Tensor]]:
    """Training crops, evaluation crops and whole evaluation images. Fills in options["steps"]."""
    train_files, eval_files = find_dataset(Path(options["dataset"] or PHOTOS))
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
    options["steps"] = options["steps"] or 1500
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
        jpeg, bpp, quality = jpeg_at(whole[i], rates[i])
        original = to_float(whole[i])
        caption = f"JPEG (quality {quality}): {bpp:.2f} bpp, {psnr(original, jpeg):.1f} dB"
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
    head = {"optimizer": run.optimizer_name, "split": "bitstream", "step": run.step, "seconds": run.seconds}
    rates = {"bpp": mean["bpp"], "bpp_estimated": mean["bpp-estimated"], "psnr": mean["psnr-rgb"]}
    run.history.append(head | rates)


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
        plan.append((other, options["compare_learning_rate"], name, read_checkpoint(beside)
                     if beside and beside.exists() else None))  # fmt: skip
    runs = []
    for optimizer, learning_rate, name, start in plan:
        run = Run(options, optimizer, learning_rate or LEARNING_RATES[optimizer])
        runs.append(run)
        if start:
            run.load(start)
        if run.step < options["steps"]:
            with StopRequest() as stop:
                run.train(crops, eval_crops, options["steps"], stop, folder / name)
            if stop.signal:
                write_metrics(folder / "metrics.csv", runs)
                script = shlex.join([os.path.relpath(sys.argv[0]), "--resume", str(folder / CHECKPOINT)])
                print(
                    f"stopped at step {run.step} of {options['steps']} ({OPTIMIZERS[optimizer]}); checkpoint saved. "
                    f"To resume:\n  python {script}"
                )
                return 128 + stop.signal
    write_results(folder, options, runs, whole)
    for run in runs:
        row = run.evaluations()[-1]
        print(
            f"{OPTIMIZERS[run.optimizer_name]}: evaluation loss {row['loss']:.3f}, {row['bpp']:.3f} bpp, "
            f"{row['psnr']:.2f} dB after {run.step} steps, {run.seconds:.0f} s of training"
        )
    if len(runs) == 2:
        print(summarise(*runs))
    print(f"Results are in {folder}/")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
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
