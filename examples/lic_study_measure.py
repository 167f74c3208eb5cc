"""What is measured on the models of a study, their data as tables, and the time of a training step."""

import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from lic_arguments import CHECKPOINT, parse_options
from lic_checkpoint import load_trained, read_checkpoint
from lic_data import RandomCrops, batches, find_dataset, spread_crops
from lic_evaluation import forward_padded, rate_distortion, to_float
from lic_files import read_table, write_json, write_table
from lic_images import read_image
from lic_parser import make_parser
from lic_quantization import quantize
from lic_study import HERE, TABLES, Study, TrainingRun
from lic_training import Run
from torch import Tensor, nn

from soap_opt.diagnostics import OutlierMeter, basis_health
from soap_opt.integrations.compressai import latents


def measure(study: Study, run: TrainingRun, name: str) -> None:
    """One of the measurements that are wanted, into its file."""
    about = study.wanted(run)[name]
    trained = load_trained(study.folder_of(run) / CHECKPOINT)
    rows = MEASURES[about["kind"]](study, run, trained.model, about)
    write_json(study.folder_of(run) / f"{name}.json", {"about": about, "rows": rows})


def measure_rd(study: Study, run: TrainingRun, model: nn.Module, about: dict) -> list[dict]:
    pictures = (read_image(file) for file in study.images.files)
    return [{"image": name, **row} for name, row in zip(study.images.names, rate_distortion(model, pictures))]


def measure_outliers(study: Study, run: TrainingRun, model: nn.Module, about: dict) -> list[dict]:
    return outliers(model, (read_image(file) for file in study.images.files))


def measure_bases(study: Study, run: TrainingRun, model: nn.Module, about: dict) -> list[dict]:
    if study.optimizers[run.label].get("optimizer", "soap") != "soap":
        return []
    state = read_checkpoint(study.folder_of(run) / CHECKPOINT)
    resumed = Run(state["options"], "soap", run.rate, resumed=True)
    resumed.load(state)
    return [dict(row) for row in basis_health(resumed.optimizer, resumed.model)]


def measure_quantization(study: Study, run: TrainingRun, model: nn.Module, about: dict) -> list[dict]:
    if about["setting"] != "float":
        bits, rounding, ranges = about["setting"].split()
        weight_bits, activation_bits = map(int, bits.split("/"))
        options = {"iterations": about["iterations"]} if "iterations" in about else {}
        files = find_dataset(Path(study.plan["train"].get("dataset", HERE / "photos")))[0]
        images = spread_crops(files, about["calibration"])
        model = quantize(model, images, weight_bits, activation_bits, rounding, ranges, **options)
    return [{"setting": about["setting"], **row} for row in measure_rd(study, run, model, about)]


MEASURES = {
    "rd": measure_rd,
    "outliers": measure_outliers,
    "bases": measure_bases,
    "quantization": measure_quantization,
}


def collect(study: Study, data: Path) -> None:
    """All data of the finished runs as CSV tables in `data`: what the report is made from, and what is kept."""
    data.mkdir(parents=True, exist_ok=True)
    results = study.results()
    runs = [run for run in study.runs(results)[0] if run.name in results]
    tables: dict[str, list[dict]] = {name: [] for name in TABLES}
    for run in runs:
        tables["runs"].append(
            {
                "run": run.name, "optimizer": run.label, "model": run.model, "variant": run.variant,
                "experiments": " ".join(run.experiments), "learning_rate": run.rate, "steps": run.steps,
                "fraction": run.fraction, "lambda": run.lmbda, "seed": run.seed, "start": run.start, **results[run.name],
            }
        )  # fmt: skip
        for row in read_table(study.folder_of(run) / "metrics.csv"):
            if row["split"] == "eval":
                tables["evaluations"].append({"run": run.name, **{k: row[k] for k in ("step", "loss", "bpp", "psnr")}})
            elif row["split"] == "conflict":
                names = ("step", "raw", "raw_shared", "preconditioned", "preconditioned_shared", "between_steps")
                tables["conflicts"].append({"run": run.name, **{k: row[k] for k in names}})
        for name, about in study.wanted(run).items():
            measured = study.measured(run, name)
            if measured.get("about") == about:
                tables[about["kind"]] += [{"run": run.name, **row} for row in measured["rows"]]
    for name, rows in tables.items():
        if rows:
            write_table(data / f"{name}.csv", rows)


def measure_speed(study: Study, rounds: int, threads: int, data: Path, say: Callable[[str], None]) -> None:
    """Seconds of a training step (batch, forward, backward, both optimizers) of each optimizer, in turn, `rounds` times a
    period of ten steps, so that what else the machine does meets all alike. Into speed.csv, beside what other machines or
    numbers of threads gave.

    The first two periods of each are not counted: SOAP's first step makes its bases.
    """
    torch.set_num_threads(threads)
    data.mkdir(parents=True, exist_ok=True)  # before minutes of measuring
    results = study.results()
    trained, crops = {}, None
    labels = list(study.optimizers)
    for label in labels:
        run = study.run(label, "timing", rate=study.best_rate(label, results) or 1e-3)
        command = run.command(study.folder / "nowhere")
        options, _ = parse_options(make_parser(""), command[command.index(str(HERE / "train_lic.py")) + 1 :])
        options["conflict_every"] = 0
        if crops is None:
            files = find_dataset(Path(options["dataset"] or HERE / "photos"))[0]
            crops = RandomCrops(files, tuple((options["patch_size"] * 2)[:2]), 0)
        trained[label] = Run(options, options["optimizer"], run.rate)
        trained[label].model.train()
    batch_size = options["batch_size"]
    rows = []
    for turn in range(rounds + 2):
        for label, run in trained.items():
            started = time.perf_counter()
            for batch in batches(crops, 10 * turn, 10 * turn + 10, batch_size, 0, False):
                run.train_step(to_float(batch))
            seconds = (time.perf_counter() - started) / 10
            if turn >= 2:
                rows.append({"optimizer": label, "round": turn - 2, "seconds_per_step": seconds})
    about = {"processor": processor(), "threads": threads, "model": options["model"]}
    kept = [row for row in read_table(data / "speed.csv") if any(row[key] != str(value) for key, value in about.items())]
    write_table(data / "speed.csv", kept + [about | row for row in rows])
    for label in labels:
        times = sorted(row["seconds_per_step"] for row in rows if row["optimizer"] == label)
        say(f"{label}: {1000 * times[len(times) // 2]:.1f} ms a training step (median of {rounds} periods of ten)")


def outliers(model: nn.Module, pictures: Iterable[Tensor]) -> list[dict]:
    """OutlierMeter's rows over whole images, of every layer and of the latents y and z."""
    with torch.no_grad(), OutlierMeter(model, **latents(model)) as meter:
        for picture in pictures:
            forward_padded(model, to_float(picture)[None])
        return [dict(row) for row in meter.table()]


def processor() -> str:
    """The processor's name, as Linux has it; elsewhere Python's."""
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
