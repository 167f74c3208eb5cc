"""train_lic.py's command line: CompressAI's train.py vocabulary, the defaults, and what a resumed run may change."""

import argparse
from pathlib import Path

import torch
from lic_checkpoint import read_checkpoint
from lic_data import InputError
from lic_models import DEFAULT_M, DEFAULT_N, image_models, model_widths
from lic_training import IMPLEMENTATIONS, OPTIMIZERS

CHECKPOINT = "checkpoint.pth.tar"
LEARNING_RATES = {"soap": 3e-3, "adam": 1e-3, "sgd": 1e-2}
STEPS = 3500
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


def seed(text: str) -> int:
    value = not_negative(int)(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not below 2^63")
    return value


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")  # without thirty lines of usage in front of it


def make_parser(description: str) -> argparse.ArgumentParser:
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    parser = Parser(
        "train_lic.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument

    add(
        "-m",
        "--model",
        default="bmshj2018-hyperprior",
        metavar="NAME",
        help=f"one of {', '.join(image_models())} (default: %(default)s)",
    )
    add("--quality", type=int, metavar="Q", help="the widths of this quality in CompressAI's zoo, with random weights")
    add("--N", type=positive(int), help=f"channels of the transforms (default: {DEFAULT_N})")
    add("--M", type=positive(int), help=f"channels of the latent, where the model has them (default: {DEFAULT_M})")
    add(
        "-d",
        "--dataset",
        metavar="DIR",
        help="train/ and test/ (or eval/) folders of images as CompressAI lays them out, or any folder of images, "
        "searched recursively, of which a tenth is held out (default: the photos beside this script)",
    )
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="soap",
        help="for the network's weights (default: %(default)s); the quantiles of the entropy bottlenecks are always Adam's",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--fused",
        action="store_true",
        help="the optimizer's fused implementation: SOAP's own kernels (the default on a CPU; on CUDA, where they have not "
        "been run yet, by this request only), torch's for adam and sgd. Without --fused and --foreach the optimizer chooses",
    )
    kind.add_argument("--foreach", action="store_true", help="its multi-tensor implementation, in PyTorch's own operators")
    add("-lr", "--learning-rate", type=positive(float), metavar="LR", help=f"(default: {rates})")
    add("--aux-learning-rate", type=positive(float), default=1e-3, metavar="LR", help="of the quantiles (default: %(default)s)")
    add(
        "--lambda",
        dest="lmbda",
        type=positive(float),
        default=0.013,
        metavar="L",
        help="loss = L * 255^2 * MSE + bpp, or L * (1 - MS-SSIM) + bpp (default: %(default)s)",
    )
    add("--metric", choices=("mse", "ms-ssim"), default="mse", help="distortion in the loss (default: %(default)s)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive(int), help=f"training steps, one batch each (default: {STEPS})")
    length.add_argument(
        "-e", "--epochs", type=positive(int), help="instead of --steps: passes over the images, one crop of each"
    )
    add("--batch-size", type=positive(int), default=8, help="crops per step (default: %(default)s)")
    add(
        "--patch-size",
        type=positive(int),
        nargs="+",
        default=[64],
        metavar="PX",
        help="side of the crops, or height and width, in pixels (default: 64)",
    )
    add(
        "--clip-max-norm",
        "--clip_max_norm",
        type=not_negative(float),
        default=1.0,
        metavar="NORM",
        help="clip the gradient's norm, 0: never (default: %(default)s)",
    )
    add(
        "--schedule",
        choices=("linear", "cosine", "constant"),
        default="linear",
        help="of the learning rate after warm-up, over all steps; linear: constant, then down to 0 over the last 30 %% "
        "(default: %(default)s)",
    )
    add(
        "--warmup-steps",
        type=not_negative(int),
        default=50,
        metavar="STEPS",
        help="the learning rate rises linearly for so long (default: %(default)s)",
    )
    add(
        "--eval-every",
        type=positive(int),
        default=100,
        metavar="STEPS",
        help="steps between evaluations (default: %(default)s)",
    )
    add(
        "--eval-crop",
        type=not_negative(int),
        nargs=2,
        default=[256, 384],
        metavar=("H", "W"),
        help="evaluate on centre crops of at most this size in pixels, 0 0: on whole images (default: 256 384); the "
        "bitstreams at the end are always of whole images",
    )
    add(
        "-n",
        "--num-workers",
        type=not_negative(int),
        default=0,
        help="processes that prepare batches; images that fit into memory need none (default: %(default)s)",
    )
    add(
        "--seed",
        type=seed,
        default=0,
        help="of the weights, the crops and the quantisation noise (default: %(default)s)",
    )
    add("--device", default="cpu", help="cpu, cuda, cuda:1, .. (default: %(default)s)")
    add(
        "--amp",
        action="store_true",
        help="mixed precision: bfloat16 on a CPU, float16 with loss scaling on CUDA; the entropy models stay in float32",
    )
    add(
        "--save",
        nargs="?",
        const="",
        metavar="DIR",
        help="folder for the results (default: the first of runs/MODEL-OPTIMIZER, .. -2, .. that is free)",
    )
    add(
        "--resume",
        "--checkpoint",
        metavar="CHECKPOINT",
        help="continue this run with its own arguments, to the same result as if it had never stopped",
    )
    add(
        "--compare",
        choices=OPTIMIZERS,
        metavar="OPTIMIZER",
        help="afterwards also train the same initial weights on the same batches with this optimizer (soap, adam or "
        "sgd), and draw both in one curve",
    )
    add("--compare-learning-rate", type=positive(float), metavar="LR", help=f"its learning rate (default: {rates})")
    return parser


def parse_options(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[dict, dict | None]:
    """The run's options, complete, and the checkpoint's contents when it resumes one."""
    not_given = object()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    parsed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, not_given))))
    given = {name: value for name, value in parsed.items() if value is not not_given}
    options = {name: parser.get_default(name) for name in names} | given
    if "dataset" in given:
        if not given["dataset"]:
            raise InputError("--dataset is empty; give a folder of images, or leave it out for the photos beside this script")
        options["dataset"] = given["dataset"] = str(Path(given["dataset"]).resolve())

    state = None
    if options["resume"]:
        state = read_checkpoint(Path(options["resume"]))
        stored = dict.fromkeys(IMPLEMENTATIONS, False) | state["options"]  # (older checkpoints know of none)
        if state["optimizer_name"] != stored["optimizer"]:
            raise InputError(f"{options['resume']} is the comparison's; resume the {CHECKPOINT} beside it")
        for name, value in given.items():
            if name not in MAY_CHANGE and in_force(name, value, stored) != in_force(name, stored[name], stored):
                flag = "--lambda" if name == "lmbda" else "--" + name.replace("_", "-")
                now = in_force(name, stored[name], stored)
                raise InputError(f"{flag} {value} differs from the checkpoint's {now}; leave it out to resume")
        same = given.get("compare", stored["compare"]) == stored["compare"]
        if same and stored["compare"] and "compare_learning_rate" in given:
            now = stored["compare_learning_rate"] or LEARNING_RATES[stored["compare"]]
            begun = Path(options["resume"]).with_name(f"checkpoint-{stored['compare']}.pth.tar").exists()
            if begun and given["compare_learning_rate"] != now:
                raise InputError(
                    f"--compare-learning-rate {given['compare_learning_rate']} differs from the comparison's {now}, which has "
                    "begun; leave it out to resume"
                )
        if not same:
            stored = stored | {"compare_learning_rate": None}
        if given.get("steps", state["step"]) < state["step"]:
            raise InputError(f"--steps {given['steps']}: the checkpoint is already at step {state['step']}")
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


def in_force(name: str, value, stored: dict):
    """What an option's value means in the stored run: defaults that depend on other options, one number for two equal ones."""
    if name == "learning_rate":
        return value or LEARNING_RATES[stored["optimizer"]]
    if name in ("N", "M"):
        return value or stored["widths"].get(name)
    if name == "patch_size":
        return (value * 2)[:2]
    if name == "dataset":
        return value or "the photos beside this script"
    return value


def check_device(name: str) -> None:
    try:
        torch.empty(1, device=name).item()  # ("meta" has no values)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
