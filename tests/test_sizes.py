"""No file is above 450 lines, and no function above 80."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("soap_opt", "kernels", "csrc", "tests", "bench", "examples", "docs")
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh")
FILES = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)]
FILES = [path for path in FILES if not {".venv", "runs"} & set(path.relative_to(ROOT).parts)]


def test_no_file_is_too_long():
    assert len(FILES) > 200
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {path: lines for path, lines in lengths.items() if lines > 450} == {}


def test_no_python_function_is_too_long():
    functions = [
        (f"{path.relative_to(ROOT)}: {node.name}", node.end_lineno - node.lineno + 1)
        for path in FILES
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert [(name, lines) for name, lines in functions if lines > 80] == []


def test_no_cpp_function_is_too_long():
    """What begins in the first column (clang-format indents the rest, and nothing inside of a namespace) and ends with a brace
    there: a function, or a class with all of its members."""
    found = {}
    for path in FILES:
        if path.suffix == ".py":
            continue
        begun = None
        for number, line in enumerate(path.read_text().splitlines()):
            if re.match(r"[A-Za-z_]", line) and not line.startswith(
                ("namespace", "template", "struct", "extern", "TORCH_LIBRARY")
            ):
                begun = (number, line) if begun is None else begun
            if line.startswith("}") or (begun and line.endswith(";") and not line.startswith(" ")):
                if begun and line.startswith("}"):
                    found[f"{path.relative_to(ROOT)}: {begun[1]}"] = number - begun[0] + 1
                begun = None
    assert len(found) > 100
    assert {name: lines for name, lines in found.items() if lines > 80} == {}
