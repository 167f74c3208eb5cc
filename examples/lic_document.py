"""A report: sections with text, tables and pictures, and the verdict on each claim, as Markdown and as one HTML page; and the
data of a study that it is made from, its CSV tables only, so that it can be made again from what was kept of runs that are
long gone."""

import base64
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from lic_files import InputError, read_table  # noqa: E402
from lic_plots import COLOURS  # noqa: E402
from lic_rd import markdown  # noqa: E402
from lic_study import Study, TrainingRun  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402

EXTRA_COLOURS = ["#8c6d1f", "#1b9e77", "#e7298a", "#7570b3", "#66a61e", "#a6761d"]


def number(text: str) -> float:
    return float(text) if text not in ("", None) else math.nan


class Data:
    """The tables of a study, its numbers as floats."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs = {row["run"]: row for row in read_table(folder / "runs.csv")}
        if not self.runs:
            raise InputError(f"{folder} holds no finished run yet")
        for row in self.runs.values():
            for key in ("learning_rate", "steps", "fraction", "lambda", "loss", "bpp", "psnr"):
                row[key] = number(row[key])
            row["experiments"] = row["experiments"].split()
            row.setdefault("start", "")

    def rows(self, table: str) -> dict[str, list[dict[str, str]]]:
        """Of a table, by run."""
        by_run = defaultdict(list)
        for row in read_table(self.folder / f"{table}.csv"):
            if row["run"] in self.runs:
                by_run[row["run"]].append(row)
        return by_run

    def results(self) -> dict[str, dict]:
        """As Study.results has them."""
        return {
            name: {"failed": run["failed"] == "True", "loss": None if math.isnan(run["loss"]) else run["loss"]}
            for name, run in self.runs.items()
        }

    def of(self, experiment: str, **wanted) -> list[dict]:
        """Runs of an experiment, by their columns."""
        return [
            row
            for row in self.runs.values()
            if experiment in row["experiments"] and all(row[key] == value for key, value in wanted.items())
        ]


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean, and the range over seeds; NaN is a run that failed."""
    values = list(values)
    finite = [value for value in values if not math.isnan(value)]
    failed = f"{len(values) - len(finite)} of {len(values)} failed"
    if not finite:
        return failed if values else "-"
    mean = f"{np.mean(finite):.{digits}f}"
    text = mean if len(finite) == 1 else f"{mean} ({min(finite):.{digits}f} to {max(finite):.{digits}f})"
    return text if len(finite) == len(values) else f"{text}, {failed}"


class Report:
    """Sections in order, each with text, a table or a picture; and the verdict on each claim."""

    def __init__(self, study: Study, data: Data, folder: Path):
        self.study, self.data, self.folder = study, data, folder
        self.parts: list[dict] = []
        self.claims: list[dict] = []
        self.colours = {}
        spare = iter(EXTRA_COLOURS)
        used = set()
        for label, options in study.optimizers.items():
            colour = COLOURS.get(options.get("optimizer", "soap"))
            self.colours[label] = colour if colour not in used else next(spare, "#777777")
            used.add(colour)

    def section(self, title: str) -> None:
        self.parts.append({"kind": "title", "text": title})

    def text(self, text: str) -> None:
        self.parts.append({"kind": "text", "text": text})

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        if rows:
            self.parts.append({"kind": "table", "header": header, "rows": rows})

    def picture(self, name: str, caption: str) -> None:
        self.parts.append({"kind": "picture", "name": name, "caption": caption})

    def claim(
        self, claim: str, bar: str, measured: str, holds: bool | None, experiments: Sequence[str] = (), table: str = ""
    ) -> None:
        """experiments, table: what it rests on. While runs, or what is measured on them, are missing the claim is open,
        whatever those that are there say."""
        if missing := self.missing(experiments, table):
            measured, holds = f"{measured} (so far; runs missing: {missing})", None
        self.claims.append({"claim": claim, "bar": bar, "measured": measured, "holds": holds})

    @functools.cached_property
    def asked_for(self) -> tuple[list[TrainingRun], list[tuple[str, str]]]:
        """Study.runs, once for all claims."""
        return self.study.runs(self.data.results())

    def missing(self, experiments: Sequence[str], table: str = "") -> int:
        """How many runs of the baseline and of the subject the study asks for that the data do not have, in a table of theirs
        neither. A run that failed is not missing: it cannot be measured."""
        runs, waiting = self.asked_for
        labels = (self.study.baseline, self.study.subject)
        wanted = [run for run in runs if run.label in labels and set(experiments) & set(run.experiments)]
        if table:
            wanted = [run for run in wanted if table in self.study.measurements(run)]
        measured = self.data.rows(table) if table else self.data.runs
        there = measured.keys() | {name for name, run in self.data.runs.items() if run["failed"] == "True"}
        return sum(run.name not in there for run in wanted) + sum(
            experiment in experiments and label in labels for experiment, label in waiting
        )

    def made(self) -> str:
        """How many runs there are, and which of those that the study asks for are not."""
        runs, waiting = self.asked_for
        absent = Counter(min(run.experiments, default="others") for run in runs if run.name not in self.data.runs)
        absent.update(experiment for experiment, _ in waiting)
        missing = ", ".join(f"{count} of {experiment}" for experiment, count in sorted(absent.items()))
        return f"{len(self.data.runs)} runs." + (f" Not made yet: {missing}." if missing else "")

    def start_of(self, run: dict) -> str:
        """What a run begins from, in words."""
        start = self.data.runs.get(run["start"])
        return f"{start['optimizer']}'s after {start['steps']:,.0f}" if start else run["start"]

    def axes(self, columns: int, width: float = 5.2, height: float = 4.4):
        figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False)
        for axis in axes[0]:
            axis.grid(alpha=0.3, which="both")
        return figure, axes[0]

    def save(self, figure, name: str, caption: str) -> None:
        """The picture with one legend for all of its axes, below them: nothing is covered."""
        entries = {}
        for axis in figure.axes:
            entries = dict(zip(*axis.get_legend_handles_labels()[::-1])) | entries
        if entries:
            figure.legend(entries.values(), entries, loc="outside lower center", ncols=min(len(entries), 5), frameon=False)
        figure.savefig(self.folder / name, dpi=100)
        plt.close(figure)
        self.picture(name, caption)

    def verdict(self, claim: dict) -> str:
        return {True: "holds", False: "does not hold", None: "open"}[claim["holds"]]

    def claims_table(self) -> tuple[list[str], list[list[str]]]:
        rows = [[c["claim"], c["bar"], c["measured"], self.verdict(c)] for c in self.claims]
        return ["claim", "bar", "measured", ""], rows

    def as_markdown(self) -> str:
        lines = [f"# {self.study.title}", "", self.made(), ""]
        if self.claims:
            lines += [markdown(*self.claims_table()), ""]
        for part in self.parts:
            if part["kind"] == "title":
                lines += [f"## {part['text']}", ""]
            elif part["kind"] == "text":
                lines += [part["text"], ""]
            elif part["kind"] == "table":
                lines += [markdown(part["header"], part["rows"]), ""]
            else:
                lines += [f"![{part['caption']}]({part['name']})", "", part["caption"], ""]
        return "\n".join(lines)

    def as_html(self) -> str:
        parts = [
            part | {"data": base64.b64encode((self.folder / part["name"]).read_bytes()).decode()}
            if part["kind"] == "picture"
            else part
            for part in self.parts
        ]
        header, rows = self.claims_table()
        template = jinja2.Environment(autoescape=True).from_string(PAGE)
        return template.render(title=self.study.title, made=self.made(), header=header, rows=rows, parts=parts)


def plain_numbers(axis) -> None:
    """Numbers instead of powers on a logarithmic axis (once its limits are set), as many as have room."""
    low, high = axis.get_view_interval()
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")
    if high > 5 * low:
        axis.set_minor_locator(LogLocator(subs=(2, 3, 5)))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px }
td, th { border-bottom: 1px solid #ddd; padding: 4px 10px; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #888 } img { max-width: 100% } figcaption { color: #555; font-size: 13px }
.holds { color: #1a7f37 } .not { color: #b42318 }
</style></head><body>
<h1>{{ title }}</h1><p>{{ made }}</p>
{% if rows %}<table><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td{% if loop.last %} class="{{ 'holds' if cell == 'holds' else 'not' }}"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}
{% for part in parts %}
{% if part.kind == "title" %}<h2>{{ part.text }}</h2>
{% elif part.kind == "text" %}<p>{{ part.text }}</p>
{% elif part.kind == "table" %}<table><tr>{% for cell in part.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in part.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{% else %}<figure><img src="data:image/png;base64,{{ part.data }}" alt="{{ part.caption }}"><figcaption>{{ part.caption }}</figcaption></figure>
{% endif %}{% endfor %}
</body></html>
"""  # noqa: E501
