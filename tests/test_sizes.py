"""No file is above 450 lines, and no Python function above 80."""

import ast
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
