"""GPTQ's Triton kernel gives what the loop in PyTorch gives, by Triton's interpreter, and compiles for GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hfcompress.quantization import rounding
from hfcompress.quantization.rounding import kernel_runs_on

HERE = Path(__file__).parent
with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which has wheels for Linux x86_64")


def run(*words: str, **environment: str) -> str:
    """Run Python in a fresh process: Triton reads whether to interpret when it is imported."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=HERE.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_twins(**environment: str) -> None:
    """Run the checks against the loop, all of them."""
    told = run("-m", "pytest", "-p", "no:cacheprovider", "tests/column_twins.py", **environment)
    summary = re.fullmatch(r"(\d+) passed in .*", told.strip().splitlines()[-1])
    assert summary is not None, told
    assert int(summary[1]) >= 15


@with_triton
def test_the_interpreted_kernel_is_its_twin() -> None:
    run_twins(TRITON_INTERPRET="1")


@with_triton
def test_the_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """It divides as IEEE says and fuses no product into a sum, so that only the order of sums differs."""
    told = run("-m", "tests.column_compiled", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert told.split() == ["80", "90"]


def test_the_kernel_runs_on_gpus_only_and_where_it_is_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for switch, found in (("1", None), ("1", object()), ("0", object()), (None, object())):
        monkeypatch.delenv("HFCOMPRESS_TRITON", raising=False)
        if switch is not None:
            monkeypatch.setenv("HFCOMPRESS_TRITON", switch)
        monkeypatch.setattr(rounding, "find_spec", lambda name, found=found: found)
        assert kernel_runs_on(gpu) is (switch == "1" and found is not None)
        assert not kernel_runs_on(cpu)
