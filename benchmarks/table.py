"""What every benchmark needs: rows kept as JSON so that a killed run goes on, one table, and the machine it ran on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def machine() -> str:
    """Return the processor, the threads and the versions that the numbers hold for."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    flags = next((line for line in _cpuinfo() if line.startswith("flags")), "")
    tiles = "with" if "amx_bf16" in flags else "without"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    processor = names[0] if names else platform.processor()
    return f"{processor} ({tiles} AMX), {torch.get_num_threads()} threads, {versions}"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the row kept in ``file``; make it and keep it, whole or not at all, if it is not there yet."""
    if file.is_file():
        row: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return row
    row = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    scratch.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    scratch.replace(file)
    return row


def show(header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table with aligned columns."""
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
