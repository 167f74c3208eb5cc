#!/usr/bin/env python
"""Rate-distortion curves of trained models, beside JPEG's and WebP's: bpp, PSNR, MS-SSIM, BD-rate, a plot.

Takes checkpoints of train_lic.py, or with --architecture those of CompressAI's training script. Checkpoints of one model and
one optimizer at several lambdas are a curve, those that differ in the seed alone are repetitions of a point; --curve says
otherwise. An interrupted evaluation goes on where it was when the same command is given again.

Written to --save: results.md (all tables), rd.png, per_image.csv, summary.json, and eval-CURVE.json for
compressai.utils.plot.
"""

import argparse
import glob
import json
import math
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import lic_start

if __name__ == "__main__":
    lic_start.before_imports()

# ruff: noqa: E402
import compressai
import torch
from compressai.models import CompressionModel
from lic_arguments import check_device
from lic_checkpoint import TrainedModel, load_trained
from lic_evaluation import (
    CODEC_QUALITIES,
    CODECS,
    ImageSet,
    code_image,
    estimate_image,
    file_digest,
    image_set,
    measure_codec,
    measure_stored,
    read_stored,
    write_eval_json,
)
from lic_files import InputError, write_json
from lic_models import image_models
from lic_optimizers import OPTIMIZERS
from lic_parser import Parser, positive, seed
from lic_rd import (
    CONFIDENCE,
    METHODS,
    METRICS,
    RESAMPLES,
    Comparison,
    Curve,
    Point,
    bd_table,
    compare,
    describe_delta,
    points_table,
    write_per_image,
)
from lic_rd_plot import plot_rd
from torch import Tensor
from tqdm import tqdm

if __name__ == "__main__":
    lic_start.after_imports()

PHOTOS = Path(__file__).resolve().parent / "photos" / "eval"
# Options of train_lic.py in which the checkpoints of one curve should not differ, beside their steps.
TRAINING = ("learning_rate", "schedule", "warmup_steps", "betas", "weight_decay", "optimizer_args", "gradients", "refresh",
            "precondition_frequency", "clip_max_norm", "batch_size", "patch_size", "ema")  # fmt: skip


@dataclass
class Checkpoint:
    """A checkpoint to evaluate: what it says of itself, and the file that keeps its measurements."""

    path: Path
    architecture: str
    optimizer: str
    widths: dict[str, int]
    metric: str
    lmbda: float | None
    seed: str
    step: int
    stored: Path
    training: dict[str, object] = field(default_factory=dict)  # those of TRAINING that it names

    def setting(self) -> str:
        """The operating point that it belongs to; a checkpoint that names no lambda is one of its own."""
        return str(self.path) if self.lmbda is None else f"lambda {self.lmbda:g}"


# ---- checkpoints ----


def load(path: Path, architecture: str | None) -> TrainedModel:
    """load_trained, with the architecture for a checkpoint that does not name its own; every weight is finite."""
    try:
        trained = load_trained(path)
    except InputError:
        if architecture is None:
            raise
        trained = load_trained(path, architecture)
    for name, value in trained.model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{path} cannot be evaluated: {name} is not finite")
    return trained


def inspect_checkpoint(path: Path, options: argparse.Namespace, images: ImageSet) -> Checkpoint:
    """What the checkpoint says, from stored measurements of the same bytes where there are some."""
    mode = ("estimated" if options.no_bitstreams else "bitstreams") + "-" + options.device.replace(":", "")
    stored = options.cache / f"{file_digest(path)[:16]}-{images.digest[:16]}-{mode}.json"
    about = (read_stored(stored) or {}).get("about")
    if about is None or (options.architecture and about["lmbda"] is None and about["architecture"] != options.architecture):
        stored.unlink(missing_ok=True)
        trained = load(path, options.architecture)
        about = {
            "architecture": trained.architecture,
            "optimizer": trained.optimizer,
            "widths": trained.options.get("widths", {}),
            "metric": trained.options.get("metric", ""),
            "lmbda": trained.options.get("lmbda"),
            "seed": str(trained.options.get("seed", "")),
            "step": trained.step,
            "training": {name: trained.options[name] for name in TRAINING if name in trained.options},
        }
    return Checkpoint(path=path, stored=stored, **about)


def measure(checkpoint: Checkpoint, options: argparse.Namespace, images: ImageSet, progress: tqdm) -> list[dict]:
    """The measurements of every image."""

    def prepare() -> Callable[[Tensor], dict[str, float]]:
        model: CompressionModel = load(checkpoint.path, options.architecture).model.to(options.device)
        function = estimate_image if options.no_bitstreams else code_image
        return lambda image: function(model, image)[0]

    about = {key: value for key, value in asdict(checkpoint).items() if key not in ("path", "stored")}
    progress.set_description(checkpoint.path.resolve().parent.name[:30], refresh=False)
    return measure_stored(checkpoint.stored, about, images, prepare, progress)


# ---- curves ----


def automatic_labels(checkpoints: list[Checkpoint]) -> dict[str, list[Checkpoint]]:
    """Label -> checkpoints, one label for each optimizer, model, width and training metric; it says what tells them apart."""
    kinds = [
        (
            OPTIMIZERS.get(c.optimizer, c.optimizer),
            c.architecture,
            " ".join(f"{name}={width}" for name, width in c.widths.items()),
            c.metric and f"trained for {c.metric.upper()}",
        )
        for c in checkpoints
    ]
    differ = [len(set(column)) > 1 for column in zip(*kinds)]
    groups: dict[str, list[Checkpoint]] = {}
    for checkpoint, kind in zip(checkpoints, kinds):
        first = 0 if kind[0] else 1
        words = [word for i, word in enumerate(kind) if word and (i == first or differ[i])]
        groups.setdefault(", ".join(words), []).append(checkpoint)
    return groups


def explicit_labels(texts: list[str]) -> dict[str, list[Path]]:
    """--curve's LABEL=CHECKPOINT,CHECKPOINT,..; patterns are understood, because a shell leaves them alone here."""
    groups: dict[str, list[Path]] = {}
    for text in texts:
        label, equals, names = text.partition("=")
        if not (label and equals and names):
            raise InputError(f"--curve {text}: give LABEL=CHECKPOINT,CHECKPOINT,..")
        if label in groups:
            raise InputError(f"--curve {label}: given twice")
        files = []
        for name in names.split(","):
            found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
            if not found:
                raise InputError(f"--curve {label}: no file matches {name}")
            files += map(Path, found)
        groups[label] = files
    return groups


def unlike(checkpoints: list[Checkpoint]) -> str:
    """In what else than lambda and seed the training of one curve's checkpoints differs; "" where it does not."""
    named = [{"steps": c.step} | c.training for c in checkpoints]
    values = {
        name: list(dict.fromkeys(json.dumps(about[name], default=str) for about in named if name in about))
        for name in dict.fromkeys(name for about in named for name in about)
    }
    return "; ".join(f"{name} {', '.join(of)}" for name, of in values.items() if len(of) > 1)


def arrange(label: str, checkpoints: list[Checkpoint]) -> dict[str, dict[str, Checkpoint]]:
    """setting -> seed -> checkpoint."""
    points: dict[str, dict[str, Checkpoint]] = {}
    for checkpoint in checkpoints:
        runs = points.setdefault(checkpoint.setting(), {})
        if other := runs.get(checkpoint.seed):
            raise InputError(
                f"{other.path} and {checkpoint.path} are both {label}, {checkpoint.setting()}, seed {checkpoint.seed}: "
                "leave one out, or tell them apart by --curve LABEL=CHECKPOINT,.."
            )
        runs[checkpoint.seed] = checkpoint
    return points


def measure_curves(options: argparse.Namespace, images: ImageSet) -> tuple[list[Curve], dict[str, list[Checkpoint]]]:
    """All curves, measured; and the checkpoints of every label."""
    inspected: dict[Path, Checkpoint] = {}

    def inspect(path: Path) -> Checkpoint:
        if path not in inspected:
            inspected[path] = inspect_checkpoint(path, options, images)
        return inspected[path]

    groups = {label: [inspect(path) for path in paths] for label, paths in explicit_labels(options.curve).items()}
    for label, checkpoints in automatic_labels([inspect(path) for path in dict.fromkeys(options.checkpoints)]).items():
        if label in groups:
            raise InputError(f"--curve {label}: the other checkpoints have that label too; choose another")
        groups[label] = checkpoints
    codecs = {CODECS[name][0]: name for name in dict.fromkeys(options.classic)}
    if twice := groups.keys() & codecs.keys():
        raise InputError(f"--curve {min(twice)}: that is a codec's label; choose another")
    if options.anchor and options.anchor not in [*groups, *codecs]:
        raise InputError(f"--anchor {options.anchor}: the curves are {', '.join([*groups, *codecs])}")
    plan = {label: arrange(label, checkpoints) for label, checkpoints in groups.items()}
    for label, checkpoints in groups.items():
        if differing := unlike(checkpoints):
            print(
                f"warning: the curve {label} mixes checkpoints of different training ({differing}); if that is not meant, tell "
                "them apart by --curve LABEL=CHECKPOINT,..",
                file=sys.stderr,
            )

    runs = sum(len(checkpoints) for checkpoints in groups.values())
    total = len(images) * (runs + len(codecs) * len(CODEC_QUALITIES))
    curves = []
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file gets a line now and then
    with tqdm(total=total, unit="image", dynamic_ncols=True, mininterval=interval) as progress:
        for label, points in plan.items():
            measured = [
                Point(setting, {seed: measure(checkpoint, options, images, progress) for seed, checkpoint in runs.items()})
                for setting, runs in points.items()
            ]
            curves.append(Curve(label, measured, optimizer=groups[label][0].optimizer))
        for label, codec in codecs.items():
            progress.set_description(label, refresh=False)
            results = measure_codec(codec, images, options.cache, progress)
            curves.append(Curve(label, [Point(f"quality {q}", {"": r}) for q, r in results.items()], codec=True))
    return curves, groups


# ---- results ----


def slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or "curve"


def write_results(
    options: argparse.Namespace,
    images: ImageSet,
    curves: list[Curve],
    groups: dict[str, list[Checkpoint]],
    anchor: str,
    comparisons: list[Comparison],
) -> str:
    """Every file but the plot. Returns the tables."""
    folder = options.save
    write_per_image(folder / "per_image.csv", curves, images)
    taken: set[str] = set()
    for curve in curves:
        name = slug(curve.label)
        while name in taken:
            name += "-2"
        taken.add(name)
        description = "Inference (entropy-estimation)" if options.no_bitstreams else "Inference (ans)"
        description = "Pillow" if curve.codec else description
        write_eval_json(folder / f"eval-{name}.json", curve.label, [point.mean() for point in curve.points], description)

    rate = "estimated from the likelihoods" if options.no_bitstreams else "of the bitstreams"
    text = f"{len(images)} images; bpp is {rate}. Means over the images, ± the standard deviation over the seeds.\n\n"
    text += points_table(curves)
    if comparisons:
        text += (
            f"\n\nBjontegaard deltas ({options.method} interpolation), {100 * options.confidence:g} % intervals of a paired "
            f"bootstrap over images and seeds ({options.resamples} resamples).\n\n{bd_table(comparisons)}"
        )
    (folder / "results.md").write_text(text + "\n", encoding="utf-8")

    summary = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "compressai": compressai.__version__},
        "device": options.device,
        "images": images.names,
        "bitstreams": not options.no_bitstreams,
        "method": options.method,
        "resamples": options.resamples,
        "seed": options.seed,
        "anchor": anchor,
        "curves": [
            {
                "label": curve.label,
                "points": [{"setting": p.setting, "runs": len(p.runs), **p.mean()} for p in curve.points],
                "checkpoints": [
                    {key: str(v) if isinstance(v, Path) else v for key, v in asdict(c).items() if key != "stored"}
                    for c in groups.get(curve.label, [])
                ],
            }
            for curve in curves
        ],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    write_json(folder / "summary.json", summary)
    return text


def choose_anchor(options: argparse.Namespace, curves: list[Curve]) -> str:
    """--anchor, else Adam's curve, else the first one."""
    models = [curve for curve in curves if not curve.codec]
    adam = [curve.label for curve in models if curve.optimizer == "adam"]
    return options.anchor or (adam + [curve.label for curve in models])[0]


def evaluate(options: argparse.Namespace) -> int:
    if not options.checkpoints and not options.curve:
        raise InputError("nothing to evaluate: give checkpoints, or --curve LABEL=CHECKPOINT,..")
    if options.architecture and ":" not in options.architecture and options.architecture not in image_models():
        raise InputError(f"--architecture {options.architecture}: choose from {', '.join(image_models())}")
    if not 0 < options.confidence < 1:
        raise InputError(f"--confidence {options.confidence:g} is not between 0 and 1")
    check_device(options.device)
    images = image_set(options.images)
    options.cache = options.save / "cache"
    try:
        options.cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--save {options.save}: {error.strerror}") from error

    curves, groups = measure_curves(options, images)
    anchor = choose_anchor(options, curves)
    metrics = [metric for metric in METRICS if curves[0].images(metric)]
    chosen = {"method": options.method, "resamples": options.resamples, "confidence": options.confidence, "seed": options.seed}
    comparisons = compare(curves, anchor, metrics, **chosen)
    text = write_results(options, images, curves, groups, anchor, comparisons)
    remarks = {
        c.test: f"BD-rate {describe_delta(c.rate['psnr'], '%')} against {anchor}"
        for c in comparisons
        if c.anchor == anchor and not math.isnan(c.rate["psnr"].value)
    }
    plot_rd(options.save / "rd.png", curves, remarks)
    print(f"{text}\n\nResults are in {options.save}/")
    return 0


# ---- command line ----


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "evaluate_lic.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="e.g. runs/*/checkpoint.pth.tar")
    add(
        "--curve",
        action="append",
        default=[],
        metavar="LABEL=CHECKPOINT,..",
        help="a curve of these checkpoints (patterns too), whatever they say; may be repeated, and given beside others",
    )
    add(
        "--anchor",
        metavar="LABEL",
        help="the curve that the others are compared with, as well as with the codecs (default: Adam's, else the first)",
    )
    add(
        "-a",
        "--architecture",
        metavar="NAME",
        help="the model of checkpoints that do not name it, such as those of CompressAI's training script",
    )
    add(
        "--images",
        nargs="+",
        type=Path,
        default=[PHOTOS],
        metavar="DIR",
        help="folders of images, or images (default: the photos/eval beside this script)",
    )
    add(
        "--no-bitstreams",
        action="store_true",
        help="rate and quality by the forward pass alone: quicker, above all for context models",
    )
    add(
        "--classic",
        nargs="*",
        choices=list(CODECS),
        default=list(CODECS),
        help="codecs to compare with, none: without (default: jpeg webp)",
    )
    add(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help="interpolation of the Bjontegaard deltas; pchip never overshoots between points, akima follows smooth curves more "
        "closely, cubic is the original's polynomial and needs four points (default: %(default)s)",
    )
    add("--resamples", type=positive(int), default=RESAMPLES, metavar="N", help="of the bootstrap (default: %(default)s)")
    add("--confidence", type=float, default=CONFIDENCE, metavar="P", help="of its intervals (default: %(default)s)")
    add("--seed", type=seed, default=0, help="of the bootstrap (default: %(default)s)")
    add("--device", default="cpu", help="for the networks; the entropy coder is the CPU's anyway (default: %(default)s)")
    add(
        "--save",
        type=Path,
        default=Path("runs/evaluation"),
        metavar="DIR",
        help="folder for the results and for cache/, from which what has been measured is not measured again "
        "(default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        return evaluate(options)
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
