"""The benchmark for GPUs says so where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_quantize.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_ends_with_one_sentence_and_does_nothing(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--data", str(text), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu_quantize.py needs an NVIDIA GPU, and torch")
    assert line.endswith("finds none on this machine.")
    assert list(tmp_path.iterdir()) == []
