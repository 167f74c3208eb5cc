#!/usr/bin/env python
"""Compare optimizers on learned image compression: steps and time to a loss, rate-distortion curves, conflicts between
gradients, outliers, and what quantisation costs.

A study is a YAML file; `quick`, `standard`, `gpu` and `full` are in studies/ beside this script. Every run is a command of
train_lic.py in a folder of its own under the study's; a study that was stopped or killed goes on where it was. The data of
all finished runs, and a report made from them (report.html, report.md and its pictures), are in the study's folder.
"""

import argparse
import shlex
import sys
from pathlib import Path

import lic_start

if __name__ == "__main__":
    lic_start.before_imports()

# ruff: noqa: E402
from lic_files import InputError
from lic_parser import Parser, argument, positive
from lic_report import write_report
from lic_study import EXPERIMENTS, Study, all_studies
from lic_study_measure import collect, measure_speed
from lic_study_runs import execute

if __name__ == "__main__":
    lic_start.after_imports()


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "study_lic.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = ", ".join(path.stem for path in all_studies())
    parser.add_argument("study", help=f"{names}, or a YAML file of your own")
    parser.add_argument("--save", metavar="DIR", help="the study's folder (default: runs/study-STUDY)")
    what = parser.add_argument_group("what to do (default: all runs, then the report)").add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="show the runs, which of them are done, and their commands")
    what.add_argument("--report", action="store_true", help="only write the data and the report of what is there")
    what.add_argument(
        "--time",
        action="store_true",
        help="measure the seconds of a training step of each optimizer, in turn, on a machine that does nothing else; the "
        "report takes time from there, whatever happened beside the runs",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--only", choices=EXPERIMENTS, help="only the runs of this part")
    how.add_argument("--jobs", type=positive(int), default=1, help="runs at a time (default: %(default)s)")
    how.add_argument("--threads", type=positive(int), default=1, help="of each run (default: %(default)s)")
    how.add_argument(
        "--set",
        type=argument,
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="an option of train_lic.py for every run, other than the study's: --set dataset=DIR --set amp=true",
    )
    how.add_argument(
        "--data",
        metavar="DIR",
        help="where the tables are written and the report is made from, and where the report goes then (default: data/ and "
        "report/ in the study's folder). Without any run in the study's folder the tables are only read",
    )
    return parser


def list_runs(study: Study) -> None:
    results = study.results()
    runs, waiting = study.runs(results)
    for run in runs:
        state = "failed" if results.get(run.name, {}).get("failed") else "done" if run.name in results else "to do"
        print(f"{state:6} {run.name}  ({', '.join(run.experiments)})\n       {shlex.join(run.command(study.folder_of(run)))}")
    print(
        f"{sum(run.name in results for run in runs)} of {len(runs)} done, {len(waiting)} more when the learning rates are known"
    )


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    known = {path.stem: path for path in all_studies()}
    path = known.get(options.study, Path(options.study))
    try:
        changes = {name: {"true": True, "false": False}.get(value, value) for name, value in options.set}
        study = Study(path, Path(options.save or f"runs/study-{path.stem}"), changes)
        data = Path(options.data) if options.data else study.folder / "data"
        if options.list:
            list_runs(study)
            return 0
        complete = True
        if options.time:
            measure_speed(study, rounds=12, threads=options.threads, data=data, say=print)
        elif not options.report:
            (study.folder / "runs").mkdir(parents=True, exist_ok=True)
            complete = execute(study, options.jobs, options.threads, options.only, lambda line: print(line, flush=True))
        if study.results():
            collect(study, data)
        if study.results() or options.report:
            write_report(study, data, study.folder / "report" if not options.data else data)
    except InputError as error:
        parser.error(str(error))
    except OSError as error:
        print(f"study_lic.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    if not complete:
        print("stopped before all runs were done; the same command goes on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
