"""A study of optimizers on learned image compression: which runs a YAML file asks for, and which are there.

Every run is a command of train_lic.py in a folder of its own, so that it can be repeated by hand, and a study that is killed
goes on where it was. What is measured afterwards on a trained model is a file beside its checkpoint.
"""

import functools
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from lic_arguments import CHECKPOINT, LAMBDAS
from lic_evaluation import ImageSet, image_set
from lic_files import InputError
from lic_optimizers import LEARNING_RATES, OPTIMIZERS
from lic_parser import make_parser

HERE = Path(__file__).resolve().parent
RESUMABLE = {"save-every", "num-workers", "test-batch-size"}  # options that make no other run
MEASUREMENTS = ("rd", "outliers", "bases", "quantization")  # on trained models
TABLES = ("runs", "evaluations", "conflicts", *MEASUREMENTS)
PARTS = {  # of a study: what each has to have, and what it may have besides
    "rates": ({"grid"}, {"fraction", "seeds", "start", "lambda"}),
    "horizons": ({"fractions", "optimizers"}, {"seeds"}),
    "curves": ({"lambdas", "optimizers"}, {"fraction", "seeds", "start"}),
    "ablations": ({"variants", "optimizers"}, {"fraction", "seeds"}),
    "models": ({"model", "optimizers"}, {"fraction", "seeds"}),
    "comparisons": ({"optimizers"}, {"fraction", "seeds"}),
}
EXPERIMENTS = tuple(PARTS)
SETTINGS = {
    "title", "train", "optimizers", "baseline", "subject", "steps", "evaluations", "bars", "measure", "processes", *EXPERIMENTS
}  # fmt: skip


@dataclass
class TrainingRun:
    """One command of train_lic.py.

    Attributes:
        name: of its folder; says what distinguishes it from the study's others.
        label: the optimizer's name in the study.
        options: train_lic.py's, by their long names.
        steps, lmbda, seed, rate, model: of the options, for the tables.
        variant: of an ablation, "option=value".
        experiments: what it belongs to.
        fraction: its steps as a part of the study's.
        start: the name of the run whose weights it begins from; "" for new ones.
        trained: how long the model has been trained at its end, as a part of the study's steps: with the start's.
    """

    name: str
    label: str
    options: dict[str, object]
    steps: int
    fraction: float
    lmbda: float
    seed: int
    rate: float
    model: str
    variant: str = ""
    experiments: list[str] = field(default_factory=list)
    processes: int = 1
    start: str = ""
    trained: float = 0.0

    def command(self, folder: Path) -> list[str]:
        """To begin the run, or to go on with it."""
        command = [sys.executable]
        if self.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        command.append(str(HERE / "train_lic.py"))
        checkpoint = folder / CHECKPOINT
        if checkpoint.exists():
            return [*command, "--resume", str(checkpoint)]
        start = {"init": str(folder.parent / self.start / CHECKPOINT)} if self.start else {}
        for name, value in (self.options | start).items():
            if value is True:
                command.append(f"--{name}")
            elif value is not False and value is not None:
                values = value if isinstance(value, list) else [value]
                command += [f"--{name}", *map(str, values)]
        return [*command, "--save", str(folder)]


def check_plan(plan: object) -> None:
    """Whether a study's file says something that can be done: an error after hours of training is a late one.

    Raises:
        InputError: what is not understood, and where.
    """
    has(plan, "the study", {"train", "optimizers", "baseline", "steps"}, SETTINGS)
    options = {text[2:] for action in make_parser("")._actions for text in action.option_strings if text.startswith("--")}
    if not isinstance(plan["steps"], int) or plan["steps"] < 1:
        raise InputError(f"steps: {plan['steps']!r} is not a number of steps")
    has(plan["train"], "train", set(), options)
    has(plan["optimizers"], "optimizers", set(), None)
    for label, arguments in plan["optimizers"].items():
        has(arguments or {}, f"the optimizer {label!r}", set(), options)
        if (name := (arguments or {}).get("optimizer", "soap")) not in OPTIMIZERS:
            raise InputError(f"the optimizer {label!r}: {name} is none of {', '.join(OPTIMIZERS)}")
    for what, label in (("baseline", plan["baseline"]), ("subject", plan.get("subject", "SOAP"))):
        if label not in plan["optimizers"]:
            raise InputError(f"the {what} {label!r} is none of {', '.join(plan['optimizers'])}")
    for experiment, (needed, more) in PARTS.items():
        parts = plan.get(experiment) or []
        for part in parts if isinstance(parts, list) else [parts]:
            has(part, experiment, needed, needed | more | (options if experiment == "models" else set()))
            for label in [*part.get("grid", ()), *part.get("optimizers", ())]:
                if label not in plan["optimizers"]:
                    raise InputError(f"{experiment} names {label!r}, which is none of {', '.join(plan['optimizers'])}")
            if "start" in part:
                has(part["start"], f"the start of {experiment}", {"optimizer"}, {"optimizer", "fraction"})
                if (label := part["start"]["optimizer"]) not in plan["optimizers"]:
                    raise InputError(f"{experiment} starts from {label!r}, which is none of {', '.join(plan['optimizers'])}")
            for variant in part.get("variants", ()):
                has(variant, "a variant", set(), options | {"rate-factor"})
            lists = {key: part[key] for key in ("seeds", "fractions", "lambdas") if key in part}
            lists |= {f"grid: {label}": rates for label, rates in part.get("grid", {}).items()}
            for name, values in (lists | {"fraction": [part.get("fraction", 1.0)]}).items():
                try:
                    fine = isinstance(values, list) and values and all(float(v) > 0 or name == "seeds" for v in values)
                except (TypeError, ValueError):
                    fine = False
                if not fine:
                    raise InputError(f"{experiment}: {name}: {values!r} is not a list of numbers above 0")


def has(part: object, where: str, needed: set[str], allowed: set[str] | None) -> None:
    """That a part of a study's file is a mapping with these keys (allowed None: with any).

    Raises:
        InputError: it is not.
    """
    if not isinstance(part, dict):
        raise InputError(f"{where} should be a mapping of names to values, not {part!r}")
    if missing := needed - part.keys():
        raise InputError(f"{where} has no {', '.join(map(repr, sorted(missing)))}")
    if allowed is not None and (unknown := {str(key) for key in part} - allowed):
        choices = f"one of {', '.join(sorted(allowed))}" if len(allowed) < 20 else "an option of train_lic.py"
        raise InputError(f"{where}: {', '.join(sorted(unknown))} is not {choices}")


class Study:
    """A study as its YAML file describes it, in a folder: which runs it asks for, which of them are there, and what is to be
    measured on their models. changes: options of train_lic.py, other than the file's, of all runs.

    Raises:
        InputError: the file cannot be read or says what is not understood.
    """

    def __init__(self, path: Path, folder: Path, changes: dict[str, object] | None = None):
        try:
            plan = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise InputError(f"cannot read the study {path}: {' '.join(str(error).split())}") from error
        try:
            check_plan(plan)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        plan["train"] |= changes or {}
        self.path, self.folder, self.plan = path, folder, plan
        self.processes: int = plan.get("processes", 1)
        self.name = path.stem
        self.title: str = plan.get("title", self.name)
        self.optimizers: dict[str, dict] = {label: dict(options or {}) for label, options in plan["optimizers"].items()}
        self.baseline: str = plan["baseline"]
        self.subject: str = plan.get("subject", "SOAP")
        self.steps: int = plan["steps"]
        self.bars: dict[str, float] = plan.get("bars", {})

    # ---- which runs ----

    def run(
        self,
        label: str,
        *experiments: str,
        rate: float,
        fraction: float = 1.0,
        seed: int = 0,
        start: TrainingRun | None = None,
        **changes,
    ) -> TrainingRun:
        """The run of an optimizer, from the weights that `start` ends with; `changes` are options other than the study's."""
        steps = max(1, round(fraction * self.steps))
        options = {"steps": steps, "seed": seed, "bitstreams": "none"} | self.plan["train"] | self.optimizers[label]
        options |= {"learning-rate": rate, "eval-every": max(1, steps // self.plan.get("evaluations", 24))}
        varied = {k: v for k, v in changes.items() if k not in ("lambda", "model")}
        options |= changes
        lmbda, model = (
            float(options.get("lambda", LAMBDAS[options.get("metric", "mse")])),
            str(options.get("model", "bmshj2018-hyperprior")),
        )
        variant = " ".join(f"{k}={' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in varied.items())
        parts = [Path(model.rpartition(":")[2]).name, slug(label), f"lr{rate:g}", str(steps), f"l{lmbda:g}"]
        parts += [f"s{seed}"] + ([re.sub(r"[^\w=.,+-]+", "_", variant)] if variant else [])
        parts += [f"from-{slug(start.label)}-{start.steps}"] if start else []
        return TrainingRun(
            name="-".join(parts), label=label, options=options, steps=steps, fraction=fraction, lmbda=lmbda, seed=seed,
            rate=rate, model=model, variant=variant, experiments=list(experiments), processes=self.processes,
            start=start.name if start else "", trained=fraction + (start.trained if start else 0.0),
        )  # fmt: skip

    def grid(self, part: dict, label: str, results: dict[str, dict]) -> list[TrainingRun] | None:
        """An optimizer's runs of one of the learning rate grids; None while what they start from has no learning rate yet."""
        runs = []
        rates = part["grid"][label]
        changes = {"lambda": part["lambda"]} if "lambda" in part else {}
        # From the middle outwards: an hour shows most.
        for rate in sorted(rates, key=lambda rate: abs(rates.index(rate) - len(rates) // 2)):
            for seed in part.get("seeds", [0]):
                start = self.start(part, seed, results)
                if start is None and "start" in part:
                    return None
                fraction = part.get("fraction", 1.0)
                runs.append(self.run(label, "rates", rate=float(rate), fraction=fraction, seed=seed, start=start, **changes))
        return runs

    def start(self, part: dict, seed: int, results: dict[str, dict]) -> TrainingRun | None:
        """The run whose weights those of a part with a "start" begin from: an optimizer's at its best rate, with the study's
        lambda; None without one, or while its learning rate is not known."""
        if not (start := part.get("start")):
            return None
        fraction = start.get("fraction", 1.0)
        rate = self.best_rate(start["optimizer"], results, fraction)
        return None if rate is None else self.run(start["optimizer"], rate=rate, fraction=fraction, seed=seed)

    def parts(self, experiment: str) -> list[dict]:
        parts = self.plan.get(experiment) or []
        return parts if isinstance(parts, list) else [parts]

    def best_rate(self, label: str, results: dict[str, dict], fraction: float = 1.0, start: dict | None = None) -> float | None:
        """Of the grid nearest in length to `fraction` (of two, the longer) the rate of the lowest mean final loss; the
        optimizer's default where the study has no grid for it; None while the grid is not complete.

        start: as the part has it whose runs are to be made; a grid that starts from there goes before those that do not.
        """
        grids = [part for part in self.parts("rates") if label in part["grid"] and part.get("start") == start]
        if not grids and start:
            return self.best_rate(label, results, fraction)
        if not grids:
            return LEARNING_RATES[self.optimizers[label].get("optimizer", "soap")]
        lengths = {part.get("fraction", 1.0) for part in grids}
        nearest = min(lengths, key=lambda f: (abs(math.log(f / fraction)), -f))
        losses: dict[float, list[float]] = {}
        for part in grids:
            if part.get("fraction", 1.0) == nearest:
                if (runs := self.grid(part, label, results)) is None:
                    return None
                for run in runs:
                    if run.name not in results:
                        return None
                    loss = results[run.name]["loss"]
                    losses.setdefault(run.rate, []).append(math.inf if loss is None else loss)
        return min(losses, key=lambda rate: (sum(losses[rate]) / len(losses[rate]), rate))

    def runs(self, results: dict[str, dict]) -> tuple[list[TrainingRun], list[tuple[str, str]]]:
        """All runs that can be named by now, and of those that wait for a learning rate the experiment and the optimizer.

        Runs that several experiments share are there once.
        """
        by_name: dict[str, TrainingRun] = {}
        waiting: list[tuple[str, str]] = []

        def keep(run: TrainingRun) -> None:
            known = by_name.setdefault(run.name, run)
            if (known.options, known.start) != (run.options, run.start):
                raise InputError(f"{self.path}: two different runs would be called {run.name}")
            known.experiments += [experiment for experiment in run.experiments if experiment not in known.experiments]

        def add(label: str, experiment: str, part: dict, seed: int, **settings) -> None:
            fraction = settings.pop("fraction", part.get("fraction", 1.0))
            rate = settings.pop("rate", None) or self.best_rate(label, results, fraction, part.get("start"))
            start = self.start(part, seed, results)
            if start:
                keep(start)
            if rate is None or (start is None and "start" in part):
                waiting.append((experiment, label))
                return
            keep(self.run(label, experiment, rate=rate, fraction=fraction, seed=seed, start=start, **settings))

        for part in self.parts("rates"):
            for label, rates in part["grid"].items():
                runs = self.grid(part, label, results)
                if runs is None:
                    waiting += [("rates", label)] * len(rates) * len(part.get("seeds", [0]))
                for run in runs or ():
                    keep(run)
                for seed in part.get("seeds", [0]):
                    if start := self.start(part, seed, results):
                        keep(start)
        for part in self.parts("horizons"):
            for seed in part.get("seeds", [0]):
                for fraction in part["fractions"]:
                    for label in part["optimizers"]:
                        add(label, "horizons", part, seed, fraction=fraction)
        for part in self.parts("curves"):
            for seed in part.get("seeds", [0]):
                for lmbda in part["lambdas"]:
                    for label in part["optimizers"]:
                        add(label, "curves", part, seed, **{"lambda": lmbda})
        for part in self.parts("comparisons"):
            for seed in part.get("seeds", [0]):
                for label in part["optimizers"]:
                    add(label, "comparisons", part, seed)
        for part in self.parts("models"):
            for seed in part.get("seeds", [0]):
                for label in part["optimizers"]:
                    options = {k: v for k, v in part.items() if k not in ("optimizers", "seeds", "fraction")}
                    add(label, "models", part, seed, **options)
        for part in self.parts("ablations"):
            for label in part["optimizers"]:
                best = self.best_rate(label, results, part.get("fraction", 1.0))
                for seed in part.get("seeds", [0]):
                    add(label, "ablations", part, seed)  # what the variants differ from
                    for options in part["variants"]:
                        options = dict(options)
                        factor = options.pop("rate-factor", 1)
                        add(label, "ablations", part, seed, rate=best and best * factor, **options)
        return list(by_name.values()), waiting

    # ---- running them ----

    def folder_of(self, run: TrainingRun) -> Path:
        return self.folder / "runs" / run.name

    def results(self) -> dict[str, dict]:
        """Of every finished run its name and how it ended: "failed" (it had to stop), and "loss", "bpp", "psnr" of the last
        evaluation, None where it failed."""
        found = {}
        for path in (self.folder / "runs").glob("*/finished.json"):
            try:
                found[path.parent.name] = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
        return found

    # ---- what is to be measured on trained models ----

    @functools.cached_property
    def images(self) -> ImageSet:
        """The evaluation images: the photographs in this repository, and scikit-image's where the study says so."""
        paths = [Path(self.plan["train"].get("eval-dataset", HERE / "photos" / "eval"))]
        if names := self.plan.get("measure", {}).get("scikit-image", []):
            paths += [scikit_image_file(name) for name in names]
        return image_set(paths)

    def measurements(self, run: TrainingRun) -> list[str]:
        """Which of MEASUREMENTS are to be made on this run's model."""
        found = []
        for kind in MEASUREMENTS:
            of = self.plan.get("measure", {}).get(kind)
            if not of or not set(of.get("experiments", EXPERIMENTS)) & set(run.experiments):
                continue
            if run.trained >= of.get("from-fraction", 0) and run.label in of.get("optimizers", self.optimizers):
                found.append(kind)
        return found

    def wanted(self, run: TrainingRun) -> dict[str, dict]:
        """What is to be measured on this run's model: the name of each measurement's file, and what it depends on besides the
        model, of which "kind" is one of MEASUREMENTS."""
        found: dict[str, dict] = {}
        for kind in self.measurements(run):
            of = self.plan["measure"][kind]
            about = {"kind": kind, "images": self.images.digest}
            if kind != "quantization":
                found[kind] = about
                continue
            found["quantization-float"] = about | {"setting": "float"}
            about |= {"calibration": of.get("calibration", 16)}
            about |= {"iterations": of["iterations"]} if "iterations" in of else {}
            for choice in itertools.product(of["bits"], of.get("rounding", ["nearest"]), of.get("ranges", ["mse"])):
                setting = " ".join(choice)
                found["quantization-" + re.sub(r"\W+", "-", setting)] = about | {"setting": setting}
        return found

    def missing(self, run: TrainingRun) -> list[str]:
        """What is wanted of the run's model and has not been measured, or otherwise than it is wanted now."""
        return [name for name, about in self.wanted(run).items() if self.measured(run, name).get("about") != about]

    def measured(self, run: TrainingRun, name: str) -> dict:
        """A measurement's file: "about", as `wanted` says, and its "rows"; empty where there is none."""
        try:
            return json.loads((self.folder_of(run) / f"{name}.json").read_text())
        except (OSError, ValueError):
            return {}


def slug(label: str) -> str:
    return label.lower().replace(" ", "-")


def scikit_image_file(name: str) -> Path:
    """A picture that scikit-image's wheel carries (no download)."""
    try:
        import skimage.data
    except ImportError as error:
        raise InputError("the study evaluates on scikit-image's pictures: pip install scikit-image") from error
    folder = Path(skimage.data.__file__).parent
    found = [path for path in (folder / f"{name}.png", folder / f"{name}.jpg") if path.exists()]
    if not found:
        raise InputError(f"scikit-image carries no picture {name!r} in {folder.name}/")
    return found[0]


def all_studies() -> Iterator[Path]:
    yield from sorted((HERE / "studies").glob("*.yaml"))
