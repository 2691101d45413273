"""The Makefile installs once, and again when the chosen torch has changed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Stands in for Python: `-m venv FOLDER` puts it into the new environment, and there it writes down what pip is told.
PYTHON = """#!/bin/sh
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; else echo "$@" >> {log}; fi
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_changed_torch_is_installed(tmp_path: Path) -> None:
    log, python, environment = tmp_path / "log", tmp_path / "python", tmp_path / "environment"
    python.write_text(PYTHON.format(log=log))
    python.chmod(0o755)

    def installs(torch: str) -> list[str]:
        log.write_text("")
        target = environment / ".installed-demo"
        command = ["make", str(target), f"VENV={environment}", f"PYTHON={python}", f"TORCH={torch}"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return [line for line in log.read_text().splitlines() if "torch" in line]

    install = "-m pip install --quiet"
    assert installs("torch==2.13.0") == [f"{install} torch==2.13.0"]
    assert installs("torch==2.13.0") == []
    other = "torch --index-url https://download.example/cu130"
    assert installs(other) == ["-m pip uninstall --quiet --yes torch", f"{install} {other}"]
    assert installs(other) == []
