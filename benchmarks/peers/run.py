"""What the scripts that quantize share: their arguments, their calibration tokens, and the facts that they leave."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def arguments(about: str | None, methods: Iterable[str]) -> argparse.ArgumentParser:
    """Return a parser with what every peer is told."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True, help="safetensors file with `calibration`, (rows, length)")
    parser.add_argument("--method", choices=list(methods), required=True)
    parser.add_argument("--output", required=True, type=Path)
    return parser


def grid_arguments(
    about: str | None, methods: Iterable[str], bits: Callable[[str], int | str] = int
) -> argparse.ArgumentParser:
    """Return a parser with what every peer is told that quantizes.  bits: reads that argument."""
    parser = arguments(about, methods)
    parser.add_argument("--bits", type=bits, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--device", default="cpu", help="a tool that looks for a GPU by itself is not told")
    return parser


def calibration_rows(file: str) -> Tensor:
    """Return the calibration tokens, (rows, length)."""
    return load_file(file)["calibration"]


def peak_mib() -> float:
    """Return the most memory that this process has held, in MiB, from the kernel (Linux).

    ``resource.getrusage`` would begin with the peak of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 1024


class Run:
    """Seconds and peak memory of what runs inside ``with Run() as run:``; on a GPU, of the whole process."""

    def __enter__(self) -> Run:
        self.loaded_mib = peak_mib()
        self.on_gpu = torch.cuda.is_available()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.started
        self.peak_mib = peak_mib()

    def write(self, folder: Path, package: str, **more: Any) -> None:
        """Write ``run.json`` beside the checkpoint, with ``more`` that the tool tells of its run."""
        facts = {**more, "seconds": self.seconds, "loaded_mib": self.loaded_mib, "peak_mib": self.peak_mib}
        if self.on_gpu:
            facts["cuda_mib"] = torch.cuda.max_memory_allocated() / 2**20
        tool = f"{package} {version(package)}, torch {torch.__version__}"
        (folder / "run.json").write_text(json.dumps({**facts, "version": tool}))
