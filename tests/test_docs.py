"""The documentation: its examples run, and what docs/architecture.md says of the sources is so."""

import ast
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import soap_opt
from soap_opt.options import names_of

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench import must_reach, processor, results  # noqa: E402

DOCS = ROOT / "docs"
NEEDED = {"learned_image_compression.md": "compressai"}


def code_blocks(page: Path) -> list[str]:
    """The page's python blocks, each behind as many empty lines as stand before it: an error names the page's line."""
    text = page.read_text()
    return [
        "\n" * text[: found.start(1)].count("\n") + found[1]
        for found in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    ]


def run(page: Path, names: dict) -> None:
    for block in code_blocks(page):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize(
    "page", ["index.md", "getting_started.md", "swapping_adam.md", "learned_image_compression.md", "distributed.md"]
)
def test_the_examples_run(page):
    if page in NEEDED:
        pytest.importorskip(NEEDED[page])
    if page == "distributed.md" and not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch without gloo")
    names = {"__name__": "example"}
    try:
        run(DOCS / page, names)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if page == "getting_started.md":
        assert names["losses"][-1] < 0.01 * names["losses"][0]


def test_the_readme_s_example_runs():
    names = {"net": torch.nn.Linear(3, 2)}
    run(ROOT / "README.md", names)
    assert type(names["optimizer"]) is soap_opt.SOAP


def test_what_the_readme_repeats_is_the_same():
    """The table of differences stands in the README and in docs/swapping_adam.md; the table of options has every option."""

    def table(page: str, heading: str) -> list[str]:
        return re.search(rf"^{re.escape(heading)}.*\n((?:\|.*\n)+)", (ROOT / page).read_text(), re.M)[1].splitlines()

    assert table("README.md", "| | `torch.optim.Adam`") == table("docs/swapping_adam.md", "| | `torch.optim.Adam`")
    rows = table("docs/swapping_adam.md", "| option | default")
    assert {re.match(r"\| `(\w+)`", row)[1] for row in rows[1:]} == set(names_of())


# ---- docs/architecture.md -------------------------------------------------------------------------------------------------

ARCHITECTURE = (DOCS / "architecture.md").read_text()


def tables(section: str) -> list[list[list[str]]]:
    """The tables of a part of the page: rows of cells, the heading left out."""
    found = re.findall(r"(?:^\|.*\n)+", section, re.M)
    return [[[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in rows.splitlines()[2:]] for rows in found]


def part(heading: str) -> str:
    level = heading.split(" ")[0]
    return re.search(rf"^{re.escape(heading)}.*?\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", ARCHITECTURE, re.M | re.S)[1]


def quoted(cell: str) -> list[str]:
    return [text.replace(r"\|", "|") for text in re.findall(r"`([^`]*)`", cell)]


ROUTES = re.findall(r"^### (To .*): (\d+) calls, (\d+) changes of file$", ARCHITECTURE, re.M)


def names_in(file: str, function: str) -> set[str]:
    """All names and attributes that a function of a module mentions."""
    nodes = ast.parse((ROOT / file).read_text()).body
    for name in function.split("."):
        (node,) = [n for n in nodes if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == name]
        nodes = node.body
    mentioned = [
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute))
    ]
    return set(mentioned)


@pytest.mark.parametrize(("route", "calls", "changes"), ROUTES)
def test_the_routes_are_those_of_the_sources(route, calls, changes):
    (rows,) = tables(part(f"### {route}"))
    steps = [(quoted(file)[0], quoted(function)[0]) for file, function in rows]
    assert (len(steps) - 1, sum(a != b for (a, _), (b, _) in pairwise(steps))) == (int(calls), int(changes))
    for (file, function), (called_file, called) in pairwise(steps):
        if called_file.startswith("kernels/"):  # which kernel a launch launches is a table's to say
            assert f"def {called}(" in (ROOT / called_file).read_text()
            continue
        if called == "direct_step":  # a method of the module
            assert "_ext.compiled_part().step_(" in (ROOT / file).read_text()
            assert re.search(r'\{"step_", .*soap_opt::direct_step', (ROOT / "csrc/library.cpp").read_text())
            assert f"PyObject* {called}(" in (ROOT / called_file).read_text()
            continue
        if called_file.startswith("csrc/"):
            call = f"= {called}(" if file.startswith("csrc/") else f"torch.ops.soap_opt.{called}"
            assert call in (ROOT / file).read_text()
            assert f'm.impl("{called}", &{called});' in (ROOT / called_file).read_text()
            continue
        assert called.split(".")[-1] in names_in(file, function), f"{function} of {file} does not call {called}"
        names_in(called_file, called)  # it is there


def test_there_are_three_routes():
    assert len(ROUTES) == 3


def test_the_table_of_stages_names_what_is_there():
    schemas = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/library.cpp").read_text())
    (rows,) = tables(part("## Stages"))
    assert {name for row in rows for name in quoted(row[1])} == set(schemas)
    for row in rows:
        for cell in row[2:]:
            assert cell == "-" or quoted(cell), row
            for file in quoted(cell):
                assert (ROOT / file).exists(), file


def test_the_edits_of_an_option_are_all_listed():
    of_package, of_tests = [], []
    section = part("## How to add an elementwise option")
    *groups, last = tables(section)
    for rows, listed in [*((rows, of_package) for rows in groups), (last, of_tests)]:
        for file, edit, _ in rows:
            listed += [quoted(file)[0]]
            assert quoted(edit)[0] in (ROOT / quoted(file)[0]).read_text(), f"{file}: {edit}"
    handing_over, arithmetic, more = map(len, groups)
    files = len({row[0] for row in groups[0]})
    assert f"takes {handing_over} edits in {files} files" in section
    assert f"takes {arithmetic} edits" in section
    assert f"after {handing_over + arithmetic} edits" in section and f"takes {more} more" in " ".join(section.split())
    of_option = re.compile(r"\bnormalize(_grads)?\b|\bNORMALIZE\b")
    suffixes = (".py", ".cpp", ".h", ".cu", ".cuh")
    sources = [path for folder in ("soap_opt", "csrc", "kernels") for path in (ROOT / folder).rglob("*.*")]
    sources = [path for path in sources if path.suffix in suffixes and (ROOT / "soap_opt/kernels") not in path.parents]
    assert {str(path.relative_to(ROOT)) for path in sources if of_option.search(path.read_text())} == set(of_package)


def test_the_tables_of_targets_are_those_of_the_results():
    page = must_reach.PAGE.read_text()
    assert page.split(must_reach.START)[1].split(must_reach.END)[0] == must_reach.every(must_reach.summary) + "\n"
    assert {folder.name for folder in processor.measured()} <= {*processor.KINDS.values()}  # every folder of timings has a name


@pytest.mark.parametrize(
    "found, kind",
    [
        ({"vendor_id_raw": "AuthenticAMD", "family": 25, "model": 17, "brand_raw": "AMD EPYC"}, "zen4"),
        ({"vendor_id_raw": "GenuineIntel", "family": 6, "model": 143}, "sapphire-rapids"),
        ({"vendor_id_raw": "GenuineIntel", "family": 6, "model": 999}, "genuineintel-6-999"),
        ({"vendor_id_raw": "ARM"}, "arm-0-0"),
    ],
)
def test_a_kind_of_processor_is_a_folders_name(found, kind, monkeypatch):
    monkeypatch.setattr(processor, "info", lambda: found)
    assert processor.kind() == kind and processor.results().parent == results.RESULTS
