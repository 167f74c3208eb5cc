"""train_lic.py's command line: CompressAI's train.py vocabulary, in groups."""

import argparse

from lic_models import DEFAULT_M, DEFAULT_N, image_models
from lic_optimizers import COMBINATIONS, LEARNING_RATES, OPTIMIZERS, SCHEDULES, parse_argument

STEPS = 3500
RATES = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())


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


def save_every(text: str) -> tuple[str, float]:
    """500: steps; 10m: minutes."""
    minutes = text.endswith("m")
    value = positive(float if minutes else int)(text.removesuffix("m"))
    return ("minutes" if minutes else "steps", value)


save_every.__name__ = "number of steps, or of minutes as 10m"


def bitstreams(text: str) -> int | None:
    """all: None; none: 0; or how many."""
    return {"all": None, "none": 0}[text] if text in ("all", "none") else positive(int)(text)


bitstreams.__name__ = "number of images, all or none"


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def argument(text: str) -> tuple[str, object]:
    try:
        return parse_argument(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Arguments(argparse.Action):
    """NAME=VALUE ... into a dict."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, dict(values))


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = Parser(
        "train_lic.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model_options(parser)
    loss_options(parser)
    optimizer_options(parser)
    schedule_options(parser)
    result_options(parser)
    machine_options(parser)
    return parser


def model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model and images").add_argument
    add(
        "-m",
        "--model",
        default="bmshj2018-hyperprior",
        metavar="NAME",
        help=f"one of {', '.join(image_models())}, or FILE.py:CLASS, any torch.nn.Module with CompressAI's forward contract, "
        'forward(x) -> {"x_hat", "likelihoods"} (default: %(default)s)',
    )
    add(
        "--model-args",
        nargs="+",
        metavar="KEY=VALUE",
        help="further arguments of the model's constructor, as Python writes them: drop_path_rate=0.1 'config=[2, 2, 2]'",
    )
    add("--quality", type=int, metavar="Q", help="the widths of this quality in CompressAI's zoo, with random weights")
    add("--N", type=positive(int), help=f"channels of the transforms (default: {DEFAULT_N}; FILE.py:CLASS: its own)")
    add(
        "--M",
        type=positive(int),
        help=f"channels of the latent, where the model has them (default: {DEFAULT_M}; FILE.py:CLASS: its own)",
    )
    add(
        "--init",
        metavar="WEIGHTS",
        help="start from these weights (a checkpoint of this script, of any optimizer, or of CompressAI's) instead of random "
        "ones; the optimizer starts anew",
    )
    add(
        "-d",
        "--dataset",
        metavar="DIR",
        help="train/ and test/ (or valid/, val/, eval/) folders of images as CompressAI and CLIC lay them out, COCO's or "
        "Vimeo-90k's folder, or any folder of images, searched recursively, of which a tenth is held out; links are followed "
        "(default: the photos beside this script)",
    )
    add(
        "--eval-dataset",
        metavar="DIR",
        help="evaluate on all images below this folder (Kodak, CLIC, Tecnick, ..) instead, and hold none out of --dataset",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="leave out images that cannot be read or are smaller than --patch-size, and say which; without it they are an "
        "error. In either case every image is decoded once before training begins",
    )
    add(
        "--patch-size",
        type=positive(int),
        nargs="+",
        default=[64],
        metavar="PX",
        help="side of the training crops, or height and width, in pixels (default: 64)",
    )
    add("--batch-size", type=positive(int), default=8, help="crops per step, over all processes (default: %(default)s)")
    add(
        "-n",
        "--num-workers",
        type=not_negative(int),
        default=0,
        help="processes that prepare batches; images that fit into memory need none (default: %(default)s)",
    )


def loss_options(parser: argparse.ArgumentParser) -> None:
    loss = parser.add_argument_group("loss and length")
    add = loss.add_argument
    add(
        "--lambda",
        dest="lmbda",
        type=positive(float),
        metavar="L",
        help="loss = L * 255^2 * MSE + bpp, or L * (1 - MS-SSIM) + bpp (default: 0.013, of MS-SSIM 16.64)",
    )
    add("--metric", choices=("mse", "ms-ssim"), default="mse", help="distortion in the loss (default: %(default)s)")
    length = loss.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive(int), help=f"training steps, one batch each (default: {STEPS})")
    length.add_argument(
        "-e", "--epochs", type=positive(int), help="instead of --steps: passes over the images, one crop of each"
    )
    add(
        "--seed",
        type=seed,
        default=0,
        help="of the weights, the crops and the quantisation noise (default: %(default)s)",
    )


def optimizer_options(parser: argparse.ArgumentParser) -> None:
    optimizer = parser.add_argument_group("optimizer")
    add = optimizer.add_argument
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="soap",
        help="for the network's weights (default: %(default)s). sgd has a momentum of 0.9; muon, pytorch_optimizer's, steps "
        "matrices and filters, and everything else with AdamW",
    )
    add("-lr", "--learning-rate", type=positive(float), metavar="LR", help=f"(default: {RATES})")
    add(
        "--weight-decay",
        type=not_negative(float),
        metavar="W",
        help="(default: the optimizer's own: 0.01, decoupled, for soap)",
    )
    add("--betas", type=fraction, nargs=2, metavar=("B1", "B2"), help="(default: the optimizer's own: 0.95 0.95 for soap)")
    add(
        "--precondition-frequency",
        type=positive(int),
        metavar="STEPS",
        help="soap: between two refreshes of a basis (default: 10)",
    )
    add("--refresh", choices=("staggered", "together", "adaptive"), help="soap: when bases are refreshed (default: staggered)")
    add(
        "--no-precondition",
        nargs="+",
        metavar="PATTERN",
        help="soap: parameters that get plain Adam, muon: that get AdamW, by name: '*.gamma' 'entropy_bottleneck.*'",
    )
    add("--no-weight-decay", nargs="+", metavar="PATTERN", help="parameters without weight decay, by name")
    add(
        "--optimizer-args",
        type=argument,
        nargs="+",
        action=Arguments,
        default={},
        metavar="NAME=VALUE",
        help="any other arguments of the optimizer's constructor: merge_dims=True max_grad_norm=1.0",
    )
    kind = optimizer.add_mutually_exclusive_group()
    kind.add_argument(
        "--fused",
        action="store_true",
        help="the optimizer's fused implementation: SOAP's own kernels (the default on a CPU; on CUDA, where they have not "
        "been run yet, by this request only), torch's for adam and sgd. Without --fused and --foreach the optimizer chooses",
    )
    kind.add_argument("--foreach", action="store_true", help="its multi-tensor implementation, in PyTorch's own operators")
    add(
        "--clip-max-norm",
        "--clip_max_norm",
        type=not_negative(float),
        default=1.0,
        metavar="NORM",
        help="clip the gradient's norm, 0: never (default: %(default)s)",
    )
    add(
        "--gradients",
        choices=COMBINATIONS,
        default="sum",
        help="how those of rate and distortion become one: their sum; without what conflicts (pcgrad, upgrad); or weighted so "
        "that both terms fall at one rate (famo) (default: %(default)s)",
    )
    add(
        "--quantiles",
        choices=("adam", "bisection"),
        default="adam",
        help="of the entropy bottlenecks: by Adam on the auxiliary loss at each step, as CompressAI's script does, or by "
        "CompressAI's bisection before each evaluation and at the end, which is exact after few steps too, where Adam is still "
        "on its way (default: %(default)s)",
    )
    add("--aux-learning-rate", type=positive(float), default=1e-3, metavar="LR", help="of the quantiles (default: %(default)s)")
    add(
        "--ema", type=fraction, default=0.0, metavar="DECAY", help="evaluate and keep a moving average of the weights, as 0.999"
    )


def schedule_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("learning rate schedule").add_argument
    add(
        "--schedule",
        choices=SCHEDULES,
        default="linear",
        help="after warm-up. linear: constant, then down to 0 over the last 30 %% of the steps; cosine: down to 0 over all; "
        "plateau: times --lr-decay when the evaluation loss has not fallen for --plateau-patience evaluations; multistep: "
        "times --lr-decay at --milestones (default: %(default)s)",
    )
    add(
        "--warmup-steps",
        type=not_negative(int),
        default=50,
        metavar="STEPS",
        help="the learning rate rises linearly for so long (default: %(default)s)",
    )
    add("--lr-decay", type=fraction, default=0.5, metavar="FACTOR", help="of plateau and multistep (default: %(default)s)")
    add("--plateau-patience", type=positive(int), default=10, metavar="EVALUATIONS", help="(default: %(default)s)")
    add("--milestones", type=positive(int), nargs="+", metavar="STEP", help="(default: at 70, 85 and 95 %% of the steps)")


def result_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("evaluation and results").add_argument
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
        "--conflict-every",
        type=not_negative(int),
        default=0,
        metavar="STEPS",
        help="every so many steps measure how the gradients of rate and distortion, what the optimizer makes of them, and its "
        "consecutive updates are aligned, by soap_opt.diagnostics.ConflictMeter, at the price of about 1.5 steps; 0: never "
        "(default: %(default)s)",
    )
    add(
        "--test-batch-size", type=positive(int), default=1, help="images of one size evaluated at a time (default: %(default)s)"
    )
    add(
        "--bitstreams",
        type=bitstreams,
        metavar="N|all|none",
        help="how many of the whole evaluation images are coded into bitstreams and decoded at the end (default: all; models "
        "that code pixel after pixel, as mbt2018, take a minute for one of 2040 x 1356)",
    )
    add(
        "--save",
        nargs="?",
        const="",
        metavar="DIR",
        help="folder for the results (default: the first of runs/MODEL-OPTIMIZER, .. -2, .. that is free)",
    )
    add(
        "--save-every",
        type=save_every,
        default=("minutes", 5.0),
        metavar="STEPS|MINUTESm",
        help="between two checkpoints, whatever the evaluations: 500 (steps) or 10m (minutes); the one of the lowest "
        "evaluation loss is kept besides, and the one before the last (default: 5m)",
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
        help="afterwards also train the same initial weights on the same batches with this optimizer (soap, adam, ..), with "
        "its defaults, and draw both in one curve",
    )
    add("--compare-learning-rate", type=positive(float), metavar="LR", help=f"its learning rate (default: {RATES})")


def machine_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "machine", "torchrun --nproc-per-node N train_lic.py ... trains with N processes, each with its part of every batch."
    ).add_argument
    add("--device", default="cpu", help="cpu, cuda, cuda:1, .. (default: %(default)s). Not run on a GPU yet")
    add("--cuda", dest="device", action="store_const", const="cuda", help="CompressAI's name for --device cuda")
    add(
        "--amp",
        action="store_true",
        help="mixed precision: bfloat16 on a CPU, float16 with loss scaling on CUDA; the entropy models stay in float32",
    )
