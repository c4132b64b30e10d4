"""Imports flow pipeline -> stages -> store, and the generic package names are really ours."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "store": {"stages", "pipeline", "torch", "timm", "open_clip"},
    "stages": {"pipeline"},
    "stages/data": {"stages.extract", "stages.train", "stages.evaluate", "torch"},
    "stages/extract": {"stages.train", "stages.evaluate"},
    "stages/train": {"stages.extract", "stages.evaluate"},
    "stages/evaluate": {"stages.extract"},
}


def imported_modules(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_flow_one_way(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        for module in imported_modules(file):
            for banned in FORBIDDEN[folder]:
                assert not f"{module}.".startswith(f"{banned}."), (file, module)


@pytest.mark.parametrize("package", ["pipeline", "stages", "store"])
def test_package_is_not_shadowed(package: str) -> None:
    assert importlib.import_module(package).__file__ == str(ROOT / package / "__init__.py")


def test_help_does_not_import_heavy_libraries() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from pipeline.cli import app;"
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0, result.output;"
        "print(sorted({'torch', 'timm', 'zarr', 'dask', 'pandas', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
