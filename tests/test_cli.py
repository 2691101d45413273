"""What the commands print when all is well: tables for people, or JSON and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from docs.generate import all_commands
from hfcompress.checkpoint import inspect_checkpoint
from hfcompress.publish import load_facts
from hfcompress.recipe import load_recipe, recipe_schema
from hfcompress.structure import DropLayers
from tests.documents import run_card
from tests.forks import Forks
from tests.runs import language_recipe


def printed(forks: Forks, *words: object) -> str:
    run = forks.hfcompress(*words)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    return run.stdout


def test_validate_tells_what_the_recipe_is(forks: Forks) -> None:
    recipe = load_recipe("sst2_minilm")
    names = ", ".join(stage.name for stage in recipe.stages)
    expected = f"sst2_minilm is valid: sequence-classification, {len(recipe.stages)} stages ({names}).\n"
    assert printed(forks, "validate", "sst2_minilm") == expected


def test_validate_prints_the_recipe_with_its_defaults_and_changes(forks: Forks) -> None:
    changes = ["evaluate.max_rows=7"]
    shown = json.loads(printed(forks, "validate", "sst2_minilm", "--json", "--set", *changes))
    assert shown == load_recipe("sst2_minilm", changes).to_dict()
    assert shown["evaluate"]["max_rows"] == 7


def test_validate_prints_the_schema(forks: Forks) -> None:
    assert json.loads(printed(forks, "validate", "--schema")) == recipe_schema()


def test_inspect_shows_totals_and_layers(finished: Path, forks: Forks) -> None:
    table, summary = printed(forks, "inspect", finished), inspect_checkpoint(finished)
    assert "LlamaForCausalLM" in table
    assert f"{summary.total.parameters:,}" in table


def test_eval_measures_by_the_folders_own_recipe(finished: Path, tmp_path: Path, forks: Forks) -> None:
    """The metrics are those that the run itself measured on the same files and rows."""
    shown = json.loads(printed(forks, "eval", finished, "--json", "--output", tmp_path / "measured.json"))
    assert json.loads((tmp_path / "measured.json").read_text()) == shown
    stages: list[dict[str, Any]] = json.loads((finished / "measurements.json").read_text())["stages"]
    recorded = stages[-1]["measurement"]
    assert shown["metrics"] == pytest.approx(recorded["metrics"], rel=1e-5)
    for exact in ("parameters", "nonzero", "bytes_on_disk"):
        assert shown[exact] == recorded[exact]


def test_eval_prints_a_table_or_nothing(finished: Path, forks: Forks) -> None:
    assert "perplexity" in printed(forks, "eval", finished)
    assert printed(forks, "eval", finished, "--without-metrics", "--quiet") == ""


def test_run_takes_changes_and_shows_the_result(sources: Path, tmp_path: Path, forks: Forks) -> None:
    stages = [{"drop_layers": {"keep": 3}}]
    recipe = language_recipe(sources / "llama", sources / "text.jsonl", tmp_path / "out", stages=stages)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    changes = ["--set", "stages.0.drop_layers.keep=1", "--set", f"output={tmp_path / 'changed'}"]
    table = printed(forks, "run", tmp_path / "recipe.yaml", *changes)
    assert "drop_layers" in table
    assert "changed" in table
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "changed" / "config.json").read_text())["num_hidden_layers"] == 1
    assert load_recipe(tmp_path / "changed" / "recipe.yaml").stages[0].options == DropLayers(keep=1)


def test_its_card_says_how_to_load_it(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_card(finished, tmp_path, monkeypatch)
    assert "hfcompress" not in names
    rows = names["tokenizer"]("the model prune", return_tensors="pt")
    with torch.inference_mode():
        logits = names["model"](input_ids=rows["input_ids"]).logits
        expected = AutoModelForCausalLM.from_pretrained(finished)(input_ids=rows["input_ids"]).logits
    assert rows["input_ids"].shape[1] == 3
    assert torch.equal(logits, expected)


def test_card_and_report_say_where_they_are(finished: Path, tmp_path: Path, forks: Forks) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "README.md").unlink()
    assert json.loads(printed(forks, "card", folder, "--repo", "me/x", "--json")) == {
        "card": str(folder / "README.md")
    }
    card = folder / "README.md"
    written = card.read_text()
    assert 'from_pretrained("me/x")' in written
    printed(forks, "card", folder, "--json")
    assert not (folder / "README.edited.md").exists()
    card.write_text(written + "\nMy own words.\n")
    printed(forks, "card", folder, "--repo", "me/x", "--json")
    assert card.read_text() == written
    assert (folder / "README.edited.md").read_text() == written + "\nMy own words.\n"
    page = tmp_path / "report.html"
    assert printed(forks, "report", folder, "-o", page) == f"1 run compared in {page}; open it in a browser.\n"
    assert json.loads(printed(forks, "report", folder, "-o", page, "--json")) == {"report": str(page), "runs": 1}
    assert load_facts(folder).name in page.read_text()


def test_every_command_speaks_json() -> None:
    assert [
        name for name, command in all_commands().items() if not any("--json" in p.opts for p in command.params)
    ] == []
