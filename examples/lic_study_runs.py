"""Making the runs of a study, each a process of train_lic.py, several at a time, and measuring each as it ends."""

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

import filelock
import torch
from lic_files import InputError, read_table, write_json
from lic_study import RESUMABLE, Study, TrainingRun
from lic_study_measure import measure


def execute(study: Study, jobs: int, threads: int, only: str | None, say: Callable[[str], None]) -> bool:
    """Make all runs that are left, `jobs` at a time, measuring each as it ends; whether all are done. Another process may
    work on the same study: a run belongs to whoever has its folder's lock."""
    stop, lock = threading.Event(), threading.Lock()
    taken: set[str] = set()  # in this pass, by this process or another
    torch.set_num_threads(threads)

    def next_run() -> TrainingRun | None:
        with lock:
            run = next((run for run in left(study, only) if run.name not in taken), None)
            if run is not None:
                taken.add(run.name)
            return run

    def work() -> None:
        while not stop.is_set() and (run := next_run()) is not None:
            folder = study.folder_of(run)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with filelock.FileLock(folder / ".study-lock", timeout=0):
                    ended = "finished" if run.name in study.results() else train(study, run, threads, stop)
                    for name in study.missing(run) if ended == "finished" else ():
                        if not stop.is_set():
                            say(f"{run.name}: measuring {name}")
                            measure(study, run, name)
            except filelock.Timeout:
                continue  # another process has it
            with lock:
                results = study.results()
                runs, waiting = study.runs(results)
                done = sum(r.name in results for r in runs)
            later = f", {len(waiting)} more when the learning rates are known" if waiting else ""
            loss = results.get(run.name, {}).get("loss")
            say(f"{done} of {len(runs)} runs{later}: {run.name} {ended}" + (f", loss {loss:.4f}" if loss else ""))

    # A closed terminal too: it does not end the run in training, which is in a session of its own. (Not under nohup.)
    caught = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in caught}
    try:
        while not stop.is_set() and (before := left(study, only)):
            taken.clear()
            with ThreadPoolExecutor(jobs) as pool:
                workers = [pool.submit(work) for _ in range(jobs)]
                for worker in as_completed(workers):
                    if error := worker.exception():
                        stop.set()
                        raise error
            if {run.name for run in left(study, only)} == {run.name for run in before}:
                stop.wait(10)  # all of them are other processes'
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    runs, waiting = study.runs(results := study.results())
    if lost := [run for run in runs if results.get(run.start, {}).get("failed")]:
        say(f"{len(lost)} runs cannot be made: {', '.join({run.start for run in lost})}, which they start from, had to stop")
    if only and waiting and not stop.is_set():
        say(f"{len(waiting)} runs wait for learning rates that are not known yet: make those first, with --only rates")
    return not left(study, only) and not waiting


def left(study: Study, only: str | None) -> list[TrainingRun]:
    """What can be made or measured now, most urgent first, of all experiments or of one (and what its runs start from)."""
    results = study.results()
    every = study.runs(results)[0]
    runs = [run for run in every if only is None or only in run.experiments]
    starts = {run.start for run in runs}
    runs += [run for run in every if run.name in starts and run not in runs]
    for run in runs:
        check_options(study, run)
    runs = [run for run in runs if not run.start or not results.get(run.start, {"failed": True})["failed"]]
    runs = [run for run in runs if run.name not in results or (study.missing(run) and not results[run.name]["failed"])]
    return sorted(runs, key=lambda run: (run.name not in results, urgency(study, run)))


def train(study: Study, run: TrainingRun, threads: int, stop: threading.Event) -> str:
    """Begin a run or go on with it, until it ends; "finished", "failed" (its numbers are no longer finite), "busy" or
    "stopped".

    Raises:
        InputError: train_lic.py refuses it, dies, or cannot write; or what is in the folder was begun with other options.
    """
    folder = study.folder_of(run)
    folder.mkdir(parents=True, exist_ok=True)
    check_options(study, run)
    write_json(folder / "options.json", described(run))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with (folder / "log.txt").open("a") as log:
        before = log.tell()
        command = run.command(folder)
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        # In a session of its own: Ctrl-C is for this process, which hands it on once.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        asked = False
        while process.poll() is None:
            if stop.is_set() and not asked:
                process.send_signal(signal.SIGTERM)
                asked = True
            time.sleep(0.2)
    with (folder / "log.txt").open("rb") as log:
        log.seek(before)  # what earlier attempts said is not about this one
        lines = log.read().decode(errors="replace").strip().splitlines()
    last = next((line for line in reversed(lines) if line.startswith("train_lic.py: ")), lines[-1])
    diverged = last.startswith("train_lic.py: stopped: ") and ": cannot save " not in last
    if process.returncode == 0 or process.returncode == 1 and diverged:
        write_json(folder / "finished.json", outcome(study, run, process.returncode))
        return "finished" if process.returncode == 0 else "failed"
    if not asked:
        if "another run is writing there" in last:  # of a study that was killed: its run has not been
            return "busy"
        raise InputError(f"{run.name} ended with status {process.returncode}: {last} (all of it: {folder / 'log.txt'})")
    return "stopped"


def described(run: TrainingRun) -> dict[str, object]:
    """What makes a run: its options, and what it starts from."""
    return run.options | ({"start": run.start} if run.start else {})


def check_options(study: Study, run: TrainingRun) -> None:
    """A run's name does not say all of its options: what is in its folder has to be of this run, not of one that the study
    asked for before its file, or --set, was changed.

    Raises:
        InputError: it was begun with other options.
    """
    try:
        begun = json.loads((study.folder_of(run) / "options.json").read_text())
    except (OSError, ValueError):
        return  # not begun yet
    now = described(run)
    pairs = {name: (begun.get(name) or None, now.get(name) or None) for name in begun | now}
    if differing := {k: pair for k, pair in pairs.items() if k not in RESUMABLE and str(pair[0]) != str(pair[1])}:
        changes = ", ".join(f"{name} {was}, now {now}" for name, (was, now) in differing.items())
        raise InputError(
            f"{study.folder_of(run)} was begun with other options ({changes}): give the changed study another --save, or "
            "remove that folder"
        )


def outcome(study: Study, run: TrainingRun, status: int) -> dict:
    rows = [row for row in read_table(study.folder_of(run) / "metrics.csv") if row["split"] == "eval"]
    last = rows[-1] if rows else {}
    failed = status != 0 or not rows or int(last["step"]) != run.steps
    values = {key: None if failed else float(last[key]) for key in ("loss", "bpp", "psnr")}
    return {"failed": failed, **values}


def urgency(study: Study, run: TrainingRun) -> float:
    """Lowest first: from coarse to fine, so that a study of which an hour is made says something of all its parts; what claims
    rest on before the rest, and of that the longest horizons, against which all others are held, with every seed."""
    claims = run.label in (study.baseline, study.subject) and (
        not run.experiments or {"rates", "horizons", "curves"} & set(run.experiments)
    )
    if claims and "horizons" in run.experiments and run.fraction == 1.0:
        return 0.9 * run.steps
    return run.steps * (1 + run.seed) * (1 if claims else 5)
