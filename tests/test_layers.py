"""The layers of the package, read from its imports: none runs upward, none is late, and there is no circle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import soap_opt

ROOT = Path(soap_opt.__file__).parent

# From the top down: a module imports from the lines below its own alone.
LAYERS = [
    ["__init__", "report"],
    ["integrations", "integrations.compressai"],
    ["diagnostics"],
    ["diagnostics.memory", "diagnostics.bases", "diagnostics.conflict", "diagnostics.outliers"],
    ["diagnostics.table"],
    ["soap"],
    ["checkpoint", "init", "precondition", "compiled", "skipped"],
    ["work"],
    ["state"],
    ["parameters"],
    ["functional"],
    ["cpu", "cuda.stepper"],
    ["cuda.plan"],
    ["cuda.graph"],
    ["cuda.refresh"],
    ["cuda.reexpress_tables"],
    ["cuda.tables"],
    ["cuda.memory", "cuda.follow", "cuda.overlap", "cuda.launch", "cuda.problems"],
    ["cuda.columns", "cuda.configs", "cuda"],
    ["multi_tensor"],
    ["single_tensor"],
    ["gradients", "refresh_operator"],
    ["batch", "eigenbasis"],
    ["options", "layout"],
    ["schedule", "_ext", "_version"],
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

# Imported where they are needed: importing soap_opt must work, and not wait, where there is no Triton; _C may be missing.
LATE = ("kernels", "_C")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in ROOT.rglob("*.py") if "kernels" not in path.relative_to(ROOT).parts}


def imports_of(name: str) -> list[tuple[str, bool]]:
    """The package's modules that one of them imports, and whether inside of a function. What only a type checker sees is left
    out."""
    path = MODULES[name]
    package = [part for part in name.split(".") if part != "__init__"]
    package = package if path.name == "__init__.py" else package[:-1]
    found = []

    def visit(node: ast.AST, late: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom):
                absolute = child.level == 0
                if absolute and (child.module or "").split(".")[0] != "soap_opt":
                    continue
                base = (child.module or "").split(".")[1:] if absolute else package[: len(package) - child.level + 1]
                base = base if absolute else base + (child.module.split(".") if child.module else [])
                for alias in child.names:
                    whole = ".".join([*base, alias.name])
                    found.append((whole if whole in MODULES or alias.name in LATE else ".".join(base) or "__init__", late))
            visit(child, late or isinstance(child, (ast.FunctionDef, ast.Lambda)))

    visit(ast.parse(path.read_text()), False)
    return found


def test_every_module_has_its_layer():
    assert RANK.keys() == MODULES.keys()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_import_runs_upward_or_is_late(name):
    for imported, late in imports_of(name):
        if imported.split(".")[0] in LATE:
            assert late, f"{name} imports {imported} at once"
            continue
        assert not late, f"{name} imports {imported} inside of a function"
        assert RANK[name] < RANK[imported], f"{name} imports {imported}, which is not below it"


def test_importing_the_package_does_not_import_triton():
    code = "import sys, soap_opt; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
