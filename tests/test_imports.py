"""Imports go one way, and `import hfcompress` stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hfcompress

PACKAGE = Path(hfcompress.__file__).parent
LAYERS = [
    {"errors", "progress", "devices", "formats", "fresh", "logits"},
    {"packed"},
    {"callbacks", "structure", "vocabulary", "outputs", "bundled"},
    {"evaluated", "loading", "reading"},
    {"calibration", "checkpoint", "evaluate"},
    {"publish"},
    {"pruning", "distillation", "quantization"},
    {"recipe"},
    {"tasks", "data", "training"},
    {"opening"},
    {"job"},
    {"teaching"},
    {"stages", "workspace", "measuring", "checks", "clock"},
    {"gathering"},
    {"pipeline", "oneshot", "describing"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def arrows(file: Path) -> list[tuple[str, str]]:
    """Return (importing part, imported part) for every import of our own code, also inside functions."""
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hfcompress":
            parts = node.module.split(".")
            found += [(own, parts[1])] if len(parts) > 1 else [(own, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found += [(own, parts[1]) for parts in names if parts[0] == "hfcompress" and len(parts) > 1]
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: relative import"
    return found


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


def test_every_part_has_a_layer() -> None:
    assert len(FILES) > 30
    parts = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES}
    assert parts == set(RANK)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down_only(file: Path) -> None:
    for own, other in arrows(file):
        assert own == other or RANK[other] < RANK[own], f"{own} imports {other}, which is not below it"


def test_import_is_cheap_and_registers_every_public_name() -> None:
    code = (
        "import sys, hfcompress as h; assert 'torch' not in sys.modules and 'transformers' not in sys.modules; "
        "assert all(callable(getattr(h, name)) for name in h.__all__); assert set(h.__all__) <= set(dir(h))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_has_a_docstring() -> None:
    for name in hfcompress.__all__:
        value = getattr(hfcompress, name)
        assert value.__doc__, name
        assert len(value.__doc__) > 20, name
