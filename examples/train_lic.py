#!/usr/bin/env python
"""Train a learned image compression model of CompressAI with SOAP.

Without arguments: a small scale hyperprior on the photographs beside this script, a few minutes on two CPU cores.
Everything is written to runs/<name>/: a checkpoint that CompressAI's eval_model reads, metrics.csv, eval-*.json in
CompressAI's layout, curve.png and reconstructions.png.
"""

import contextlib
import os
import shlex
import signal
import sys
from pathlib import Path

import lic_start

if __name__ == "__main__":
    lic_start.before_imports()

# ruff: noqa: E402
from lic_arguments import CHECKPOINT, command_line, parse_options
from lic_checkpoint import Checkpoints, lock_folder, read_checkpoint
from lic_data import RandomCrops, check_images, digest, find_dataset, say, settle
from lic_distributed import World
from lic_evaluation import (
    MS_SSIM_SIDE,
    code_image,
    estimate_image,
    jpeg_at,
    jpeg_level,
    mean_results,
    psnr,
    to_float,
    why_not_coded,
    write_eval_json,
)
from lic_files import InputError
from lic_images import centre_crop
from lic_models import IN_A_FILE, build_model, downsampling_factor, forward_once, model_label
from lic_optimizers import LEARNING_RATES, OF_THE_OPTIMIZER, OPTIMIZERS
from lic_parser import STEPS, make_parser
from lic_plots import JpegLevel, plot_curves, plot_reconstructions
from lic_progress import Metrics, on_terminal
from lic_stop import CannotSave, StopAtOnce, StopRequest, TrainingFailed
from lic_training import Run, describe
from torch import Tensor
from tqdm import tqdm

if __name__ == "__main__":
    lic_start.after_imports()

PHOTOS = Path(__file__).resolve().parent / "photos"
PICTURES = 3  # rows of reconstructions.png


def load_images(options: dict) -> tuple[RandomCrops, list[Tensor], list[Tensor]]:
    """Training crops, evaluation crops and whole evaluation images. Fills in options["steps"], and what a resumed run needs to
    see the same images: options["left_out"] (--skip-bad's paths) and options["images"] (a digest of all names)."""
    root = Path(PHOTOS if options["dataset"] is None else options["dataset"])
    train_files, eval_files = find_dataset(root, Path(options["eval_dataset"]) if options["eval_dataset"] else None)
    height, width = (options["patch_size"] * 2)[:2]
    model = build_model(options["model"], options["widths"]).to(options["device"])
    label, multiple = model_label(options["model"]), downsampling_factor(model)
    if height % multiple or width % multiple:
        raise InputError(f"--patch-size {width} x {height}: {label} needs multiples of {multiple}")
    if IN_A_FILE.fullmatch(options["model"]):
        try:
            forward_once(model, height, width)
        except InputError as error:
            raise InputError(f"--patch-size {width} x {height}: {error}") from error
    if options["metric"] == "ms-ssim" and min(height, width) <= MS_SSIM_SIDE:
        raise InputError(f"--metric ms-ssim needs a --patch-size above {MS_SSIM_SIDE}, not {width} x {height}")

    known = options.get("left_out")  # by the run that is resumed, None at the start
    left_out = set(known or ())
    remaining = [[f for f in files if str(f) not in left_out] for files in (train_files, eval_files)]
    crops = RandomCrops(remaining[0], (height, width), options["seed"], options["skip_bad"], decode=known is None)
    checked = check_images(remaining[1])
    settle(checked, "evaluation", options["skip_bad"])
    found = digest(crops.files + checked.files, root)
    if options.get("images", found) != found:
        say(f"warning: other images are below {root} than when this run began; the same steps will see others")
    options["images"], options["left_out"] = found, sorted(left_out | {str(f) for f in (*crops.bad, *checked.bad)})

    whole = checked.decoded
    eval_crops = [centre_crop(image, options["eval_crop"]) for image in whole]
    for file, image in zip(checked.files, eval_crops, strict=True):
        if options["metric"] == "ms-ssim" and min(image.shape[-2:]) <= MS_SSIM_SIDE:
            raise InputError(
                f"--metric ms-ssim needs evaluation images above {MS_SSIM_SIDE} pixels: {file} is evaluated on "
                f"{image.shape[-1]} x {image.shape[-2]}"
            )
    if options["epochs"]:
        options["steps"] = -(-options["epochs"] * len(crops.files) // options["batch_size"])
    options["steps"] = options["steps"] or STEPS
    return crops, eval_crops, whole


def choose_folder(options: dict) -> Path:
    """The run's folder, made; never one that already holds a run, unless that is the run being resumed."""
    if options["save"]:
        folder = Path(options["save"])
        resumes = options["resume"] and folder.resolve() == Path(options["resume"]).parent.resolve()
        last = Checkpoints(folder / CHECKPOINT)
        kept = [path for path in (last.last, last.best, last.previous) if path.exists()]  # (a killed run may have but the best)
        if kept and not resumes:
            with lock_folder(folder):  # (which says so if the run is still writing)
                pass
            raise InputError(f"--save {folder} already holds a run; --resume {kept[0]}, or choose another")
        make_folder(folder, exist_ok=True)
        return folder
    first = Path("runs") / f"{model_label(options['model'])}-{options['optimizer']}"
    folder, number = first, 1
    while True:  # two that start at once do not get the same
        try:
            make_folder(folder, exist_ok=False)
            return folder
        except FileExistsError:
            number += 1
            folder = first.with_name(f"{first.name}-{number}")


def make_folder(folder: Path, exist_ok: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        if isinstance(error, FileExistsError) and not exist_ok:
            raise
        raise InputError(f"--save {folder}: {error.strerror}") from error


def write_results(folder: Path, options: dict, runs: list[Run], whole: list[Tensor], metrics: Metrics) -> None:
    """Code the whole evaluation images with every run's model; write eval-*.json and the pictures."""
    labels = {run.optimizer_name: OPTIMIZERS[run.optimizer_name] for run in runs}
    coded = whole[: options["bitstreams"]]
    if coded:
        pictured = range(0, len(coded), -(-len(coded) // PICTURES))
        columns = []  # of the picture: per run {image index: (caption, decoded image)}
        rates = {}  # image index -> bpp of the first run, which JPEG is to match
        for run in runs:
            label, model = labels[run.optimizer_name], run.entropy_coding_model()
            uncoded = why_not_coded(model, whole[0]) if IN_A_FILE.fullmatch(options["model"]) else ""
            if uncoded:
                print(f"{label}: no bitstreams: {uncoded}; rates are estimated from the likelihoods")
                model = run.model.eval()  # where it was trained
            results, column = [], {}
            progress = tqdm(coded, desc=f"{label}: bitstreams", unit="image", leave=False, disable=not on_terminal())
            for i, image in enumerate(progress):
                result, x_hat = estimate_image(model, image) if uncoded else code_image(model, image)
                results.append(result)
                if i in pictured:
                    rates.setdefault(i, result["bpp"])
                    column[i] = (f"{label}: {result['bpp']:.2f} bpp, {result['psnr-rgb']:.1f} dB", x_hat)
            columns.append(column)
            report_bitstreams(run, results, metrics)
            name = f"{model_label(options['model'])}-{options['metric']}-{run.optimizer_name}"
            write_eval_json(folder / f"eval-{run.optimizer_name}.json", name, mean_results(results))
        rows = []
        for i in pictured:
            jpeg, bpp = jpeg_at(coded[i], rates[i])
            original = to_float(coded[i])
            caption = f"JPEG: {bpp:.2f} bpp, {psnr(original, jpeg):.1f} dB"
            rows.append([("original", original), *(column[i] for column in columns), (caption, jpeg)])
        plot_reconstructions(folder / "reconstructions.png", rows)
    title = ", ".join([model_label(options["model"]), *(f"{k} = {v}" for k, v in options["widths"].items())]) + ", "
    title += f"$\\lambda$ = {options['lmbda']:g}, {options['metric']}, batches of {options['batch_size']}"
    eval_crops = [centre_crop(image, options["eval_crop"]) for image in whole]
    plot_curves(
        folder / "curve.png",
        {run.optimizer_name: run.history for run in runs},
        labels,
        title,
        {run.optimizer_name: JpegLevel(*jpeg_level(run.trained_model(), run.criterion, eval_crops)) for run in runs},
        auxiliary=any(run.aux_optimizer is not None for run in runs),
        stepped=options["schedule"] in ("plateau", "multistep"),
    )


def report_bitstreams(run: Run, results: list[dict[str, float]], metrics: Metrics) -> None:
    """Say what the bitstreams came to, and keep it in the run's history."""
    label, mean = OPTIMIZERS[run.optimizer_name], mean_results(results)
    coded = "encoding_time" in mean
    print(
        f"{label}: {len(results)} whole images "
        + (f"coded and decoded: {mean['bpp']:.3f} bpp (" if coded else "(")
        + f"estimated from the likelihoods: {mean['bpp-estimated']:.3f}), {mean['psnr-rgb']:.2f} dB"
    )
    worst = max(abs(result["psnr-rgb"] - result["psnr-forward"]) for result in results)
    if worst > 0.5:
        print(f"{label}: warning: the decoder's PSNR is up to {worst:.2f} dB off the forward pass's", file=sys.stderr)
    bpp = mean["bpp"] if coded else None
    run.record("bitstream", None, {"bpp": bpp, "bpp_estimated": mean["bpp-estimated"], "psnr": mean["psnr-rgb"]})
    metrics.flush()


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


def keep_checkpoint(run: Run, kept: Path) -> None:
    """A resumed run that has nothing left to train: its checkpoint stands beside its new results too.

    Raises:
        InputError: it cannot be written there.
    """
    (missing,) = run.world.largest([not kept.exists()])
    if missing:
        try:
            run.save(Checkpoints(kept))
        except OSError as error:
            raise InputError(f"--save {kept.parent}: {error.strerror or error}") from error


def command(*arguments: str) -> str:
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # torchrun's
    how = ["python"] if processes == "1" else ["torchrun", "--nproc-per-node", processes]
    return "  " + shlex.join([*how, os.path.relpath(sys.argv[0]), *arguments])


def how_to_resume(folder: Path) -> str:
    return f"checkpoint saved; to resume:\n{command('--resume', str(folder / CHECKPOINT))}"


def how_to_go_on(checkpoints: Checkpoints, options: dict, optimizer: str, learning_rate: float, saving: bool) -> str:
    """What a run that failed leaves, and the commands that continue from it; `saving`: it is the disk that failed."""
    if optimizer != options["optimizer"]:  # the comparison's has its defaults
        options = options | {name: None for name in OF_THE_OPTIMIZER} | {"optimizer_args": {}, "optimizer": optimizer}
    anew = {} if saving else {"learning_rate": float(f"{min(learning_rate / 3, LEARNING_RATES[optimizer]):.2g}")}
    anew |= dict.fromkeys(("resume", "save", "compare", "compare_learning_rate", "steps" if options["epochs"] else "epochs"))
    found = checkpoints.newest()
    if found is None:
        how = "where there is room (--save)" if saving else "with other options, for example"
        return (
            f"No checkpoint had been written yet; {checkpoints.last.parent}/metrics.csv has what was measured until then. To "
            f"begin anew {how}:\n{command(*command_line(options | anew))}"
        )
    path, step = found
    resume = str(checkpoints.last.parent / CHECKPOINT if checkpoints.last.name != CHECKPOINT else path)
    if saving:
        return (
            f"The last good checkpoint is of step {step}: {path}. To go on from it when there is room, or from a copy of it "
            f"elsewhere:\n{command('--resume', resume)}"
        )
    return (
        f"The last good checkpoint is of step {step}: {path}. To go on from it (a run on a CPU repeats itself to the bit):\n"
        f"{command('--resume', resume)}\n"
        "To start a new run from its weights, with other options, for example:\n"
        f"{command(*command_line(options | anew | {'init': str(path)}))}"
    )


def train(options: dict, state: dict | None, world: World) -> int:
    """Train what the options ask for and write the results. Returns the exit status."""
    with contextlib.ExitStack() as quiet:
        if not world.first:  # all look through the images, one tells of it
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
        crops, eval_crops, whole = load_images(options)
    with contextlib.ExitStack() as held:
        folder, problem = None, None
        if world.first:
            try:
                folder = choose_folder(options)
                held.enter_context(lock_folder(folder))
            except InputError as error:
                problem = str(error)
        folder, problem = world.gather((folder, problem))[0]
        if problem:  # all of them end by it
            raise InputError(problem)
        return train_in(folder, options, state, world, crops, eval_crops, whole)


def say_results(runs: list[Run]) -> None:
    """Where each run ended, and how they compare."""
    for run in runs:
        print(
            f"{OPTIMIZERS[run.optimizer_name]}: evaluation loss {describe(run.evaluations()[-1])} after {run.step} steps, "
            f"{run.seconds:.0f} s of training"
        )
        if skipped := {what: n for what, n in run.skipped().items() if n}:
            counts = " and ".join(f"{n} {what.replace('skipped_', '')}" for what, n in skipped.items())
            print(f"{OPTIMIZERS[run.optimizer_name]} passed over {counts} of single parameters (see optimizer.skipped_steps)")
        if run.evaluations()[-1]["loss"] > run.blank_loss():
            print(
                f"{OPTIMIZERS[run.optimizer_name]}: warning: a model that sends nothing and paints grey has a loss of about "
                f"{run.blank_loss():.3g}"
            )
    if len(runs) == 2:
        print(summarise(*runs))


def train_in(
    folder: Path,
    options: dict,
    state: dict | None,
    world: World,
    crops: RandomCrops,
    eval_crops: list[Tensor],
    whole: list[Tensor],
) -> int:
    """`train`, in the run's folder, which is this run's alone."""
    say = print if world.first else lambda *_, **__: None
    options["save"] = str(folder)
    if world.first:
        for leftover in (*folder.glob("*.tmp"), *folder.glob("*.new")):  # of a run that was killed while it saved
            leftover.unlink()
    if options["left_out"] and world.first:
        (folder / "left-out.txt").write_text("\n".join(options["left_out"]) + "\n")
    say(f"{len(crops.files)} images to train on, {len(whole)} to evaluate on, {options['steps']} steps; {folder}/", flush=True)
    if options["init"]:
        say(f"initial weights from {options['init']}")

    plan = [(options["optimizer"], options["learning_rate"], CHECKPOINT, state)]
    if other := options["compare"]:
        name = f"checkpoint-{other}.pth.tar"
        beside = Path(options["resume"]).with_name(name) if state else None
        other_state = read_checkpoint(beside) if beside and beside.exists() else None
        plan.append((other, options["compare_learning_rate"], name, other_state))
    runs: list[Run] = []
    metrics = Metrics(folder / "metrics.csv" if world.first else None)
    for optimizer, _, _, start in plan[1:]:  # what the comparison cannot do is said now, not after days of training
        Run(options, optimizer, 1.0, world, resumed=start is not None)
    for optimizer, learning_rate, name, start in plan:
        learning_rate = learning_rate or LEARNING_RATES[optimizer]
        run = Run(options, optimizer, learning_rate, world, resumed=start is not None)
        runs.append(run)
        if start:
            run.load(start)
        if run.step > options["steps"]:
            raise InputError(f"{options['steps']} steps: the checkpoint is already at step {run.step}")
        if run.step == options["steps"] and not run.evaluation_is_owed(options["steps"]):
            metrics.begin(run.history)
            keep_checkpoint(run, folder / name)
            continue
        checkpoints = Checkpoints(folder / name)
        try:
            with StopRequest() as stop:
                run.train(crops, eval_crops, options["steps"], stop, checkpoints, metrics)
        except TrainingFailed as failure:
            say(f"train_lic.py: stopped: {failure}", file=sys.stderr)
            say(how_to_go_on(checkpoints, options, optimizer, learning_rate, isinstance(failure, CannotSave)), file=sys.stderr)
            return 1
        (stopped,) = world.largest([stop.signal])
        if stopped:
            say(f"stopped at step {run.step} of {options['steps']} ({OPTIMIZERS[optimizer]})")
            say(how_to_resume(folder))
            return 128 + stopped
    if not world.first:
        return 0
    try:
        with StopAtOnce() as stop:
            write_results(folder, options, runs, whole, metrics)
    except KeyboardInterrupt:
        print(f"stopped after training, before all results were written\n{how_to_resume(folder)}")
        return 128 + (stop.signal or signal.SIGINT)
    except OSError as error:
        print(f"train_lic.py: cannot write the results: {error}\n{how_to_resume(folder)}", file=sys.stderr)
        return 1
    say_results(runs)
    print(f"Results are in {folder}/")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    world = World()
    try:
        options, state = parse_options(parser, sys.argv[1:] if argv is None else argv, world.size)
        world.join(options["device"])
        return train(options, state, world)
    except InputError as error:
        # One raised in a loader's worker arrives with that process's traceback in front of it.
        parser.error(str(error).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.InputError: "))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        world.leave()


if __name__ == "__main__":
    sys.exit(main())
