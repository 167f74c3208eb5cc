"""What train_lic.py's command line means: defaults that depend on others, and what a resumed run may change."""

import argparse
from pathlib import Path

import torch
from lic_checkpoint import read_checkpoint
from lic_files import InputError
from lic_models import model_widths, resolve_model
from lic_optimizers import LEARNING_RATES
from lic_parser import make_parser

CHECKPOINT = "checkpoint.pth.tar"
# What a resumed run may be given anew. Everything else comes from the checkpoint, or the result would be another's.
MAY_CHANGE = {"resume", "save", "save_every", "bitstreams", "num_workers", "test_batch_size", "device", "steps", "epochs",
              "compare", "compare_learning_rate", "skip_bad"}  # fmt: skip


def parse_options(parser: argparse.ArgumentParser, argv: list[str], processes: int = 1) -> tuple[dict, dict | None]:
    """The run's options, complete, and the checkpoint's contents when it resumes one."""
    not_given = object()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    parsed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, not_given))))
    given = {name: value for name, value in parsed.items() if value is not not_given}
    defaults = {name: parser.get_default(name) for name in names}
    options = defaults | given
    for name in {"init"} & given.keys():
        options[name] = given[name] = str(Path(given[name]).resolve())
    if "dataset" in given:
        if not given["dataset"]:
            raise InputError("--dataset is empty; give a folder of images, or leave it out for the photos beside this script")
        options["dataset"] = given["dataset"] = str(Path(given["dataset"]).resolve())
    if given.get("eval_dataset"):
        options["eval_dataset"] = given["eval_dataset"] = str(Path(given["eval_dataset"]).resolve())
    options["model"] = resolve_model(options["model"])
    if "model" in given:
        given["model"] = options["model"]

    state = None
    if options["resume"]:
        state = read_checkpoint(Path(options["resume"]))
        stored = defaults | state["options"]  # (an older checkpoint does not know all)
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
    if options["lmbda"] is None:
        options["lmbda"] = LAMBDAS[options["metric"]]
    options["widths"] = model_widths(options["model"], options["quality"], options["N"], options["M"], options["model_args"])
    if len(options["patch_size"]) > 2:
        raise InputError("--patch-size takes one or two numbers")
    if options["batch_size"] % processes:
        raise InputError(f"--batch-size {options['batch_size']} cannot be shared equally by {processes} processes")
    if state is None:
        refuse_without_effect(given, options)
    if options["compare"] == options["optimizer"]:
        raise InputError(f"--compare {options['compare']}: that is --optimizer itself")
    check_device(options["device"])
    return options, state


# Of the zoo's quality 4: 1 - MS-SSIM is so small that with MSE's lambda a model learns to send nothing.
LAMBDAS = {"mse": 0.013, "ms-ssim": 16.64}

# An option, and the other that has to have one of these values, or any, for it to have an effect
DEPENDS_ON = (
    ("milestones", "schedule", ("multistep",)),
    ("lr_decay", "schedule", ("plateau", "multistep")),
    ("plateau_patience", "schedule", ("plateau",)),
    ("aux_learning_rate", "quantiles", ("adam",)),
    ("compare_learning_rate", "compare", ()),
)


def refuse_without_effect(given: dict, options: dict) -> None:
    """Raise InputError for an option that is given and would be passed over."""
    for name, other, values in DEPENDS_ON:
        has_effect = options[other] in values if values else options[other] is not None
        if name in given and not has_effect:
            needed = " ".join([f"--{other}", *([" or ".join(values)] if values else [])])
            raise InputError(f"--{name.replace('_', '-')} has an effect with {needed} only")


def command_line(options: dict) -> list[str]:
    """The arguments that make these options, as far as they are not the defaults."""
    written: dict[str, list[str]] = {}
    parser = make_parser("")
    for action in parser._actions:
        name, value = action.dest, options.get(action.dest)
        if value == parser.get_default(name) or name in written or name == "help":
            continue
        flag = next(option for option in action.option_strings if option.startswith("--"))
        if name == "save_every":
            value = f"{value[1]:g}" + "m" * (value[0] == "minutes")
        elif name == "bitstreams":
            value = value or "none"
        elif isinstance(value, dict):
            value = [f"{key}={one}" for key, one in value.items()]
        values = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
        written[name] = [flag, *map(str, values)]
    return [part for parts in written.values() for part in parts]


def in_force(name: str, value, stored: dict):
    """What an option's value means in the stored run: defaults that depend on other options, one number for two equal ones."""
    if name == "learning_rate":
        return value or LEARNING_RATES[stored["optimizer"]]
    if name in ("N", "M"):
        return value or stored["widths"].get(name)
    if name == "patch_size":
        return (value * 2)[:2]
    if name == "betas" and value is not None:
        return list(value)
    if name == "dataset":
        return value or "the photos beside this script"
    return value


def check_device(name: str) -> None:
    try:
        torch.empty(1, device=name).item()  # ("meta" has no values)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
