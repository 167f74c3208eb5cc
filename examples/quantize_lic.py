#!/usr/bin/env python
"""Quantise trained image compression models after training, and measure what it costs.

For each checkpoint and each setting (bits of weights and activations, rounding, ranges): loss, estimated and actual bpp and
PSNR of the quantised model, beside the float model's. Checkpoints of one training recipe at four or more lambdas also give
the BD-rate of the quantised models against the float ones. Quantised numbers are simulated in float32: rates and
distortions are real, speed and memory are not measured.

Results: ptq.csv, ptq.md, ptq.json, ptq.png and results/*.json, one per checkpoint and setting; what is there already is not
measured again.
"""

import argparse
import csv
import hashlib
import json
import math
import re
import sys
import time
from pathlib import Path

import lic_start

if __name__ == "__main__":
    lic_start.before_imports()

# ruff: noqa: E402
import torch
from compressai.losses import RateDistortionLoss
from lic_adaround import ITERATIONS
from lic_arguments import CHECKPOINT
from lic_checkpoint import TrainedModel, load_trained
from lic_data import find_images, spread_crops
from lic_evaluation import code_image, evaluate, mean_results
from lic_files import InputError, write_text
from lic_grids import FLOAT, PERCENTILE, RANGES
from lic_images import centre_crop, read_image
from lic_parser import Parser, bitstreams
from lic_ptq_report import curves_table, plot, rows_table, setting_name
from lic_quantization import ROUNDINGS, quantize
from lic_rd import NoComparison, bd_rate
from torch import Tensor

if __name__ == "__main__":
    lic_start.after_imports()
from tqdm import tqdm

PHOTOS = Path(__file__).resolve().parent / "photos"
CALIBRATION_IMAGES = 16
BD_POINTS = 4  # rate points that a Bjontegaard difference takes at the least
MEASUREMENT = 2  # counts up when results measured before cannot stand beside new ones
COLUMNS = [
    "checkpoint", "model", "optimizer", "lambda", "step", "weight_bits", "activation_bits", "rounding", "ranges",
    "weight_ranges", "loss", "loss_increase_percent", "bpp_estimated", "psnr_forward", "psnr_forward_change", "bpp",
    "bpp_increase_percent", "psnr", "psnr_change", "bpp_estimated_coded", "images", "images_coded", "seconds",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ arguments


def bits(text: str) -> tuple[int, int]:
    """ "8/8" to (8, 8): weights, activations."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    values = tuple(int(number) for number in match.groups()) if match else ()
    if not match or not all(2 <= value <= 16 or value == FLOAT for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not WEIGHTS/ACTIVATIONS, each 2 to 16 bits or {FLOAT} for float")
    return values


def number(kind, low, high=math.inf, open_low=False):
    def parse(text: str):
        value = kind(text)
        if not (low < value if open_low else low <= value) or not value <= high:
            limits = f"above {low}" if open_low else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}{f' and at most {high}' if high < math.inf else ''}")
        return value

    parse.__name__ = kind.__name__  # argparse's "invalid int value"
    return parse


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "quantize_lic.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_models(parser.add_argument_group("models"))
    add_settings(parser.add_argument_group("settings", "each combination is measured"))
    add_images(parser.add_argument_group("images"))
    output = parser.add_argument_group("results")
    output.add_argument(
        "--save", type=Path, default=Path("runs/ptq"), metavar="DIR", help="folder for them (default: %(default)s)"
    )
    return parser


def add_models(models) -> None:
    models.add_argument(
        "checkpoints",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="of train_lic.py (a run's folder will do), of CompressAI's train.py, or bare weights",
    )
    models.add_argument(
        "-a", "--architecture", metavar="NAME", help="the model's name in CompressAI, for checkpoints that do not say"
    )
    models.add_argument(
        "--lambda",
        dest="lmbda",
        type=number(float, 0, open_low=True),
        metavar="L",
        help="of the loss, for checkpoints that do not say (loss = L * 255^2 * MSE + bpp)",
    )


def add_settings(settings) -> None:
    settings.add_argument(
        "--bits",
        type=bits,
        nargs="+",
        default=[(8, 8), (6, 6), (4, 8)],
        metavar="W/A",
        help=f"bits of weights and activations, 2 to 16, {FLOAT} for float (default: 8/8 6/6 4/8)",
    )
    settings.add_argument(
        "--rounding",
        nargs="+",
        choices=ROUNDINGS,
        default=list(ROUNDINGS),
        help="of the weights: to the nearest, or AdaRound (default: both)",
    )
    settings.add_argument(
        "--ranges",
        nargs="+",
        choices=RANGES,
        default=["mse"],
        help="what a grid covers: everything seen, all but the outermost values, or what has the least squared error "
        "(default: mse)",
    )
    settings.add_argument(
        "--weight-ranges",
        choices=RANGES,
        help="of the weights' grids, --ranges then being the activations' (default: the same as --ranges)",
    )
    settings.add_argument(
        "--percentile",
        type=number(float, 50, 100, open_low=True),
        default=PERCENTILE,
        metavar="P",
        help="for --ranges percentile (default: %(default)s)",
    )
    settings.add_argument(
        "--adaround-iterations",
        type=number(int, 1),
        default=ITERATIONS,
        metavar="N",
        help="per layer; more lower some layers' errors further (default: %(default)s)",
    )
    settings.add_argument("--seed", type=number(int, 0), default=0, help="of the sampled activations (default: %(default)s)")


def add_images(data) -> None:
    data.add_argument(
        "--calibration",
        default=str(CALIBRATION_IMAGES),
        metavar="DIR|N",
        help="a folder of images to set ranges and rounding on, or how many of the training photographs beside this script "
        "(default: %(default)s)",
    )
    data.add_argument(
        "--calibration-crop",
        type=number(int, 0),
        default=256,
        metavar="PX",
        help="side of their centre crops, 0: whole images (default: %(default)s)",
    )
    data.add_argument(
        "--images",
        type=Path,
        default=PHOTOS / "eval",
        metavar="DIR",
        help="folder of images to measure on (default: the evaluation photos beside this script)",
    )
    data.add_argument(
        "--eval-crop",
        type=number(int, 0),
        nargs=2,
        default=[0, 0],
        metavar=("H", "W"),
        help="measure on centre crops of at most this size, 0 0: on whole images (default: 0 0)",
    )
    data.add_argument(
        "--bitstreams",
        type=bitstreams,
        default=None,
        metavar="N|all|none",
        help="how many of them to compress and decompress; without any, rates are estimates (default: all)",
    )


# ---------------------------------------------------------------------------------------------------------- measurement


def digest(*parts) -> str:
    """A short name for everything that a result depends on."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.numpy().tobytes() if isinstance(part, Tensor) else json.dumps(part).encode())
    return sha.hexdigest()[:16]


def load_images(folder: Path, option: str, crop: tuple[int, int]) -> list[Tensor]:
    if not folder.is_dir():
        raise InputError(f"{option} {folder} is not a folder")
    files = find_images(folder)
    if not files:
        raise InputError(f"{option}: no images below {folder}")
    return [centre_crop(read_image(file), crop) for file in files]


def calibration_images(text: str, side: int) -> list[Tensor]:
    """--calibration DIR or N: centre crops of all images of a folder, or of N photographs spread over the training ones."""
    if not text.isdigit():
        return load_images(Path(text), "--calibration", (side, side))
    files = find_images(PHOTOS / "train")
    count = int(text)
    if not 1 <= count <= len(files):
        raise InputError(f"--calibration {text}: there are 1 to {len(files)} training photographs, or give a folder")
    return spread_crops(files, count, side)


def loss_of(trained: TrainedModel, lmbda: float | None) -> RateDistortionLoss:
    """The loss that the model was trained for."""
    lmbda = trained.options.get("lmbda", lmbda)
    if lmbda is None:
        raise InputError(f"{trained.path} does not say what lambda it was trained for: give --lambda")
    return RateDistortionLoss(lmbda=lmbda, metric=trained.options.get("metric", "mse"))


def measure(model, criterion, images: list[Tensor], coded: int | None) -> dict[str, float]:
    """Loss, bpp and PSNR from the forward pass over `images`; actual bpp and PSNR of the first `coded` (None: all) decoded."""
    means = evaluate(model, criterion, images)
    row = {
        "loss": means["loss"], "bpp_estimated": means["bpp"], "psnr_forward": means["psnr"],
        "images": len(images), "images_coded": len(images[:coded]),
    }  # fmt: skip
    if some := images[:coded]:
        results = [code_image(model, x)[0] for x in tqdm(some, desc="bitstreams", unit="image", leave=False, disable=None)]
        mean = mean_results(results)
        row |= {"bpp": mean["bpp"], "psnr": mean["psnr-rgb"], "bpp_estimated_coded": mean["bpp-estimated"]}
    return row


def run(options: argparse.Namespace) -> int:
    models = []
    for path in options.checkpoints:
        trained = load_trained(path / CHECKPOINT if path.is_dir() else path, options.architecture)
        models.append((trained, loss_of(trained, options.lmbda)))
    if len({trained.path.resolve() for trained, _ in models}) < len(models):
        raise InputError("a checkpoint is given twice")
    calibration = calibration_images(options.calibration, options.calibration_crop)
    images = load_images(options.images, "--images", tuple(options.eval_crop))
    try:
        (options.save / "results").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--save {options.save}: {error.strerror}") from error

    settings = [{"weight_bits": FLOAT, "activation_bits": FLOAT, "rounding": "float", "ranges": "float",
                 "weight_ranges": "float"}]  # fmt: skip
    settings += [
        {
            "weight_bits": w,
            "activation_bits": a,
            "rounding": rounding,
            "ranges": ranges,
            "weight_ranges": options.weight_ranges or ranges,
        }  # fmt: skip
        for w, a in dict.fromkeys(options.bits)
        for ranges in dict.fromkeys(options.ranges)
        for rounding in dict.fromkeys(options.rounding)
    ]
    measured_on = digest(MEASUREMENT, options.bitstreams, *images)
    calibrated_on = digest(options.seed, *calibration)
    rows = []
    with tqdm(total=len(models) * len(settings), desc="settings", unit="setting", disable=None) as progress:
        for trained, criterion in models:
            weights = digest(*trained.model.state_dict().values())
            name = checkpoint_name(trained, [other for other, _ in models])
            for setting in settings:
                progress.set_postfix_str(f"{name}, {setting_name(setting)}")
                how = []  # what else than the weights and the setting the quantised model depends on
                if setting["rounding"] != "float":
                    how.append(calibrated_on)
                    if "percentile" in (setting["ranges"], setting["weight_ranges"]):
                        how.append(options.percentile)
                    if setting["rounding"] == "adaround":
                        how.append(options.adaround_iterations)
                key = digest(weights, criterion.lmbda, criterion.metric.__class__.__name__, setting, how, measured_on)
                path = options.save / "results" / f"{key}.json"
                if path.exists():
                    row = json.loads(path.read_text())
                else:
                    started = time.perf_counter()
                    model = trained.model
                    if setting["rounding"] != "float":
                        try:
                            model = quantize(
                                model, calibration, **setting, seed=options.seed, percentile=options.percentile,
                                iterations=options.adaround_iterations, progress=True,
                            )  # fmt: skip
                        except ValueError as error:
                            raise InputError(f"{trained.path}: {error}") from error
                    row = setting | measure(model, criterion, images, options.bitstreams)
                    row["seconds"] = time.perf_counter() - started
                    write_text(path, json.dumps(row, indent=2) + "\n")
                rows.append(row | describe(trained, name, criterion))
                progress.update()
                progress.write(f"{name}, {setting_name(row)}: loss {row['loss']:.4f}, {row['seconds']:.0f} s")
    add_changes(rows)
    curves = bd_rates(models, rows)
    write_results(options, rows, curves, len(calibration))
    return 0


def checkpoint_name(trained: TrainedModel, others: list[TrainedModel]) -> str:
    """As much of the end of its path as tells it from the others; of a run's checkpoint.pth.tar, of its folder's."""

    def parts(path: Path) -> tuple[str, ...]:
        return (path.parent if path.name == CHECKPOINT else path).resolve().parts

    own = parts(trained.path)
    for depth in range(1, len(own)):
        if sum(parts(other.path)[-depth:] == own[-depth:] for other in others) == 1:
            return "/".join(own[-depth:])
    return str(trained.path)


def describe(trained: TrainedModel, name: str, criterion: RateDistortionLoss) -> dict:
    return {
        "checkpoint": name, "model": trained.architecture, "optimizer": trained.optimizer, "lambda": criterion.lmbda,
        "step": trained.step,
    }  # fmt: skip


def add_changes(rows: list[dict]) -> None:
    """Each row's difference from its checkpoint's float row."""
    anchors = {row["checkpoint"]: row for row in rows if row["rounding"] == "float"}
    for row in rows:
        anchor = anchors[row["checkpoint"]]
        row["loss_increase_percent"] = 100 * (row["loss"] / anchor["loss"] - 1)
        row["psnr_forward_change"] = row["psnr_forward"] - anchor["psnr_forward"]
        if "bpp" in row:
            row["bpp_increase_percent"] = 100 * (row["bpp"] / anchor["bpp"] - 1)
            row["psnr_change"] = row["psnr"] - anchor["psnr"]


# -------------------------------------------------------------------------------------------------------------- BD-rate


def bd_rates(models: list[tuple[TrainedModel, RateDistortionLoss]], rows: list[dict]) -> list[dict]:
    """For each training recipe with four or more lambdas and each setting, the BD-rate against the recipe's float models.

    A recipe is everything in train_lic.py's options but lambda, and what does not change the result. Where images were coded,
    rates and PSNRs are the bitstreams', else the forward pass's.
    """
    ignored = {"lmbda", "save", "resume", "num_workers", "device", "compare", "compare_learning_rate", "eval_every",
               "eval_crop", "N", "M", "quality"}  # fmt: skip
    names = list(dict.fromkeys(row["checkpoint"] for row in rows))
    recipes: dict[str, dict] = {}  # key -> its options, and its checkpoints
    for (trained, _), name in zip(models, names):
        options = {key: value for key, value in trained.options.items() if key not in ignored}
        recipe = {"model": trained.architecture, "optimizer": trained.optimizer} | options
        recipe["optimizer"] = trained.optimizer  # (of the comparison's checkpoint, not --optimizer)
        recipes.setdefault(json.dumps(recipe, sort_keys=True), recipe | {"checkpoints": []})["checkpoints"].append(name)
    differing = [
        key for key in next(iter(recipes.values())) if key != "checkpoints"
        and len({json.dumps(recipe.get(key)) for recipe in recipes.values()}) > 1
    ] or ["optimizer"]  # fmt: skip
    result = []
    for recipe in recipes.values():
        members = [row for row in rows if row["checkpoint"] in recipe["checkpoints"]]
        if len({row["lambda"] for row in members}) < BD_POINTS:
            continue
        curves: dict[str, list[dict]] = {}
        for row in members:
            curves.setdefault(setting_name(row), []).append(row)
        label = ", ".join(str(recipe[key]) if key in ("model", "optimizer") else f"{key} {recipe[key]}" for key in differing)
        for setting, points in curves.items():
            entry = {"curve": label or "models", "setting": setting, "lambdas": len(points)}
            try:
                entry["bd_rate_percent"] = bd_rate([rd_point(row) for row in curves["float"]], [rd_point(r) for r in points])
            except NoComparison as error:
                entry["note"] = str(error)
            result.append(entry | {"points": sorted(rd_point(row) for row in points)})
    return result


def rd_point(row: dict) -> tuple[float, float]:
    """(bpp, PSNR): the bitstreams' where there are any."""
    return (row["bpp"], row["psnr"]) if "bpp" in row else (row["bpp_estimated"], row["psnr_forward"])


# -------------------------------------------------------------------------------------------------------------- results


def write_results(options: argparse.Namespace, rows: list[dict], curves: list[dict], calibration: int) -> None:
    folder = options.save
    with (folder / "ptq.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    text = f"# Post-training quantisation\n\n{rows_table(rows)}\n"
    if curves:
        text += f"\n{curves_table(curves)}\n"
    images, coded = rows[0]["images"], rows[0]["images_coded"]
    text += (
        f"\nMeans over {images} images, {coded} of them coded; calibrated on {calibration}. "
        "W: bits of the weights, A: of the activations.\n"
    )
    write_text(folder / "ptq.md", text)
    about = {
        "torch": torch.__version__, "calibration_images": calibration, "calibration_crop": options.calibration_crop,
        "percentile": options.percentile, "adaround_iterations": options.adaround_iterations, "seed": options.seed,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    write_text(folder / "ptq.json", json.dumps({"about": about, "rows": rows, "bd_rates": curves}, indent=2) + "\n")
    plot(folder / "ptq.png", rows, curves)
    print(text)
    print(f"Results are in {folder}/")


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        return run(options)
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the settings that are left", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
