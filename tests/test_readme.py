"""The README's Python runs as it stands, and its table is the one that was measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, TrainingArguments

from hfcompress.packed import packed_layers
from tests.conftest import tiny_llama, token_batches
from tests.runs import WORDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_every_door_runs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(BLOCKS) == 6
    monkeypatch.chdir(ROOT)
    rows = [{name: value[0] for name, value in batch.items()} for batch in token_batches(32, rows=1)]
    folder = str(tmp_path)
    options: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 8}
    names: dict[str, Any] = {
        "model": tiny_llama(layers=4),
        "student": tiny_llama(layers=2),
        "teacher": tiny_llama(layers=4),
        "args": TrainingArguments(output_dir=folder, **options),
        "dataset": rows,
        "batches": token_batches(8),
        "tokenizer": tokenizer,
        "folder": folder,
        "original": str(tmp_path / "original"),
        "texts": [" ".join(WORDS)] * 8,
    }
    names["model"].save_pretrained(names["original"])
    tokenizer.save_pretrained(names["original"])
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert names["saved"].verification.max_logit_difference == 0.0
    assert names["reloaded"].config.num_hidden_layers == 3
    assert len(packed_layers(names["packed"])) == 28
    assert names["recipe"].stages[1].options.steps == 16


def test_the_tree_names_every_part_and_no_other() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    inside = tree.split("recipes/  model_cards/")[0]
    named = set(re.findall(r"^  ([a-z_]+)(?:\.py|/)", inside, flags=re.MULTILINE)) | {"errors", "progress"}
    there = {path.stem for path in (ROOT / "hfcompress").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert named == there - {"__pycache__", "__main__"}


def test_the_table_is_the_measured_one() -> None:
    card = (ROOT / "model_cards" / "smollm2-python-docs" / "README.md").read_text(encoding="utf-8")
    rows = [line for line in README.splitlines() if line.startswith("| ") and "%" not in line and "`" not in line]
    assert len([row for row in rows if row in card]) >= 5
