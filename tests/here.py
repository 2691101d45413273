"""Runs recipes with everything in this process: what only fresh processes can show is tested elsewhere."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hfcompress import pipeline
from hfcompress.checkpoint import save, verify
from hfcompress.checkpoint.stock_reload import answer_of
from hfcompress.measuring import evaluate_folder
from hfcompress.recipe import Recipe, load_recipe


@contextmanager
def everything_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let measurements and verifications happen in this process, on the same files, for the length of the block."""

    class Here(nullcontext["Here"]):
        """``FreshProcesses`` without any."""

        def __init__(self, *preload: str) -> None:
            super().__init__(self)

        def run(self, words: Sequence[str]) -> int:
            options = dict(itertools.pairwise(words))
            measurement = evaluate_folder(
                Path(options["eval"]), load_recipe(options["--recipe"]), with_metrics="--without-metrics" not in words
            )
            Path(options["--output"]).write_text(json.dumps(measurement.to_dict()))
            return 0

    def verified(folder: str | Path, probe: verify.Probe, trust_remote_code: bool = False) -> verify.Verification:
        model = getattr(transformers, probe.loaded_by).from_pretrained(folder).eval()
        with torch.inference_mode():
            found = answer_of(model(**probe.inputs))
        difference, largest = float((found - probe.logits).abs().max()), float(probe.logits.abs().max())
        assert difference <= probe.tolerance * largest
        return verify.Verification(difference, largest, 0.0, probe.loaded_by, probe.tolerance)

    with monkeypatch.context() as here:
        here.setattr(pipeline, "FreshProcesses", Here)
        here.setattr(save, "verify_checkpoint", verified)
        yield


def compress_here(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the main path with everything in this process."""
    with everything_here(monkeypatch):
        return pipeline.compress(recipe)


def stages_of(folder: Path) -> list[dict[str, Any]]:
    """Return what was measured after each stage."""
    stages: list[dict[str, Any]] = json.loads((folder / "measurements.json").read_text())["stages"]
    return stages
