"""The README's Python runs as it stands, and its table is the one that was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hfcompress.packed import packed_layers
from tests.documents import ROOT, readers_names, run_python
from tests.reloading import same_but_for_rounding

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_door_runs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = readers_names(tmp_path, tokenizer)
    assert run_python(README, "README.md", names) == 6
    assert same_but_for_rounding(names["saved"].verification)
    assert names["reloaded"].config.num_hidden_layers == 3
    assert len(packed_layers(names["packed"])) == 28
    assert names["recipe"].stages[1].options.steps == 16


def test_the_tree_names_every_part_and_no_other() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    inside = tree.split("recipes/  model_cards/")[0]
    named = re.findall(r"(?<=  )([a-z_]+)(?:\.py|/)(?=\s)", inside)
    there = {path.stem for path in (ROOT / "hfcompress").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert sorted(named) == sorted(there - {"__pycache__", "__main__"})


def test_the_table_is_the_measured_one() -> None:
    card = (ROOT / "model_cards" / "smollm2-python-docs" / "README.md").read_text(encoding="utf-8")
    table = re.search(r"(?<=\n\n)\| stage \|.*?\n(?=\n)", README, re.DOTALL)
    assert table
    assert table[0].count("\n") == 2 + 4
    assert f"\n\n{table[0]}\n" in card
