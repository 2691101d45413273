"""A tiny recipe with real stages, for the tests of the main path."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from hfcompress.cli import app
from hfcompress.recipe import Recipe, parse_recipe

# fmt: off
WORDS = [
    "the", "model", "weight", "layer", "head", "prune", "quantize", "distil", "small", "large", "fast", "slow",
    "good", "bad", "film", "scene", "plot", "actor", "is", "was", "not", "very", "a", "an", "of", "to", "and",
    "in", "it", "this", "that",
]
# fmt: on


def write_text(path: Path, rows: int = 100, words: int = 60) -> Path:
    """Write documents of random known words as JSON lines."""
    chooser = random.Random(0)
    lines = [json.dumps({"text": " ".join(chooser.choices(WORDS, k=words))}) for _ in range(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run_command(*words: object) -> str:
    """Run ``hfcompress`` in this process and return its standard output; errors are raised."""
    result = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def write_reviews(path: Path, rows: int = 120) -> Path:
    """Write short texts whose label is whether they hold the word good, tab separated with a header."""
    chooser = random.Random(0)
    lines = ["text\tlabel"]
    for row in range(rows):
        word = ("bad", "good")[row % 2]
        lines.append(" ".join([*chooser.choices(WORDS[:11], k=5), word]) + f"\t{row % 2}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def language_recipe(model: Path, text: Path, output: Path, **changes: Any) -> Recipe:
    """Drop two of four layers, distil while pruning, quantize by GPTQ."""
    mapping: dict[str, Any] = {
        "name": "tiny",
        "task": "causal-lm",
        "model": {"id": str(model)},
        "data": {"files": str(text), "block_size": 32},
        "output": str(output),
        "evaluate": {"prompt": "the model", "new_tokens": 4, "max_rows": 8},
        "stages": [
            {"drop_layers": {"keep": 2}},
            {
                "distill": {
                    "steps": 8,
                    "prune": {"sparsity": 0.5},
                    "training": {"per_device_train_batch_size": 4, "save_steps": 2, "learning_rate": 1e-3},
                }
            },
            {
                "quantize": {
                    "method": "gptq",
                    "bits": 4,
                    "group_size": 32,
                    "calibration_rows": 8,
                    "calibration_length": 32,
                }
            },
        ],
    }
    return parse_recipe({**mapping, **changes})


def model_files(folder: Path) -> dict[str, bytes]:
    """Return the files that are the model: the same in every run of a recipe, whatever its output is called."""
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    found = [file for file in folder.iterdir() if file.suffix == ".safetensors" or file.name in names]
    return {file.name: file.read_bytes() for file in found}
