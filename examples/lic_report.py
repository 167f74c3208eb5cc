"""The report of a study: what its data say to each claim, as pictures, Markdown and one HTML page."""

import json
import warnings
from pathlib import Path

from lic_document import Data, Report
from lic_files import InputError, write_json
from lic_report_models import outliers, quantization, rate_distortion
from lic_report_training import ablations, alignments, learning_rates, others, step_times, steps_to_a_loss
from lic_study import Study


def write(report: Report) -> None:
    report.folder.mkdir(parents=True, exist_ok=True)
    best = learning_rates(report)
    times = step_times(report)
    steps_to_a_loss(report, times)
    rate_distortion(report)
    with warnings.catch_warnings():  # what has no direction in any seed (SOAP's first step) stays NaN, and is not drawn
        warnings.filterwarnings("ignore", "Mean of empty slice|All-NaN", RuntimeWarning)
        alignments(report)
    outliers(report)
    quantization(report)
    others(report, "comparisons", "Other optimizers")
    others(report, "models", "Other models")
    ablations(report)
    failed = [name for name, run in report.data.runs.items() if run["failed"] == "True"]
    if failed:
        report.section("Runs that had to stop")
        report.text(", ".join(failed))
    write_json(report.folder / "summary.json", {"claims": report.claims, "best_rates": best, "runs": len(report.data.runs)})
    (report.folder / "report.md").write_text(report.as_markdown())
    (report.folder / "report.html").write_text(report.as_html())


def write_report(study: Study, data: Path, folder: Path) -> None:
    """All pictures, report.md, report.html (one file) and summary.json, from the tables in `data`.

    Raises:
        InputError: no run has finished yet, or the data are of optimizers that the study does not have.
    """
    tables = Data(data)
    if unknown := {run["optimizer"] for run in tables.runs.values()} - study.optimizers.keys():
        raise InputError(f"{data} has runs of {', '.join(sorted(unknown))}, which {study.path} does not: another study's data?")
    write(Report(study, tables, folder))
    print(f"The report is in {folder}/")


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())
