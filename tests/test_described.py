"""A model that calls in Python compressed has a card: of what they reported, and of its folder as it reloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hfcompress
from hfcompress.checkpoint.files import weights_digest
from hfcompress.errors import CheckpointError, OutputError
from hfcompress.publish import load_facts
from hfcompress.publish.card import EDITED, is_as_written
from hfcompress.structure import find_ffn, zero_neurons_
from tests.conftest import tiny_llama, token_batches
from tests.documents import saved
from tests.runs import run_command

pytestmark = pytest.mark.usefixtures("few_tokens_are_fine", "forked", "unpainted")
ROWS = [{**batch, "labels": batch["input_ids"]} for batch in token_batches(4)]
MEASURING: dict[str, Any] = {"batches": ROWS, "metrics": ["perplexity"]}


@pytest.fixture
def base(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    folder = saved(tiny_llama(), tokenizer, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A model")
    return folder


def quantized(base: str, folder: Path) -> hfcompress.Measurement:
    """Quantize, save and describe; return what was measured before."""
    model = AutoModelForCausalLM.from_pretrained(base)
    before = hfcompress.measure(model, **MEASURING)
    report = hfcompress.quantize(model, hfcompress.RTN(bits=4, group_size=32))
    hfcompress.save_compressed(model, folder, verify=True)
    hfcompress.write_model_card(folder, base_model=base, reports=[report], before=before, **MEASURING)
    return before


def test_its_numbers_are_those_of_the_folder_reloaded(base: str, tmp_path: Path) -> None:
    before = quantized(base, tmp_path / "small")
    facts, counted = load_facts(tmp_path / "small"), hfcompress.inspect_checkpoint(tmp_path / "small")
    again = hfcompress.measure(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), **MEASURING)
    assert facts.after.metrics == pytest.approx(again.metrics)
    assert facts.before.metrics == before.metrics
    assert (facts.after.bytes_on_disk, facts.after.parameters) == (counted.bytes_on_disk, counted.parameters)
    assert facts.before.bytes_on_disk == hfcompress.inspect_checkpoint(base).bytes_on_disk
    assert facts.after.latency
    assert facts.weights == weights_digest(tmp_path / "small")
    assert [stage.name for stage in facts.stages] == ["original", "compressed"]
    assert facts.stages[1].summary == "rtn, 4 bits"
    assert facts.verification["stock"].max_logit_difference < 1e-3
    # The process held the model before, too, so its memory says nothing of either.
    assert (facts.before.peak_memory_bytes, facts.after.peak_memory_bytes) == (None, None)
    text = (tmp_path / "small" / "README.md").read_text()
    assert "taken after reloading the checkpoint" in text
    assert "**Loads without hfcompress: yes**" in text
    assert "## Quantization error of each layer" in text
    assert not any(word in text for word in ("Trainer", "Make it again", "One run", "Calibrated", "held-out"))
    data = ModelCard.load(tmp_path / "small" / "README.md").data
    assert (data.license, data.tags, data.base_model) == ("cc-by-4.0", ["hfcompress", "quantized"], None)
    assert data.eval_results[0].metric_value == facts.after.metrics["perplexity"]
    assert is_as_written(tmp_path / "small")


def test_the_result_may_be_replaced_and_rendered_anew(base: str, tmp_path: Path) -> None:
    quantized(base, tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text()
    quantized(base, tmp_path / "small")
    hfcompress.write_model_card(tmp_path / "small", "me/small")
    assert (tmp_path / "small" / "README.md").read_text().replace("me/small", "small") != card  # times differ
    assert 'from_pretrained("me/small")' in (tmp_path / "small" / "README.md").read_text()
    assert not (tmp_path / "small" / EDITED).exists()


def test_every_kind_of_report_says_what_was_done(base: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    pruned = hfcompress.prune(model, hfcompress.Magnitude(sparsity=0.5))
    zero_neurons_(model, find_ffn(model)[0], range(32))
    shrunk = hfcompress.shrink(model)
    hfcompress.save_compressed(model, tmp_path / "small", verify=True)
    hfcompress.write_model_card(
        tmp_path / "small", base_model=base, reports=["layers as they were", pruned, shrunk], data="me/news"
    )
    facts = load_facts(tmp_path / "small")
    assert facts.stages[1].summary == (
        "layers as they were; magnitude, 50.0% of the targeted weights pruned; 0 heads and 32 neurons removed, "
        f"{shrunk.parameters[0] - shrunk.parameters[1]:,} parameters"
    )
    assert facts.stages[1].seconds is None  # as it is of two of the three
    assert facts.structure["neurons"]["model.layers.0.mlp.down_proj"] == [128, 96]
    assert len(facts.pruning_report) == len(pruned.rows)
    assert (facts.before.metrics, facts.after.metrics) == ({}, {})
    assert facts.loads_without_hfcompress is False
    text = (tmp_path / "small" / "README.md").read_text()
    assert "No metrics are given" in text
    data = ModelCard.load(tmp_path / "small" / "README.md").data
    assert (data.tags, data.datasets) == (["hfcompress", "pruned"], ["me/news"])


def test_a_plain_folder_is_counted_and_its_reload_is_not_made_up(base: str, tmp_path: Path) -> None:
    """Layers were dropped, which reports nothing: that parameters are fewer says so."""
    model = AutoModelForCausalLM.from_pretrained(base)
    before = hfcompress.measure(model, **MEASURING)
    hfcompress.drop_layers(model, hfcompress.DropLayers(keep=1))
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "README.md").write_text("My own words.")
    hfcompress.write_model_card(tmp_path / "plain", base_model=base, before=before)
    text = (tmp_path / "plain" / "README.md").read_text()
    assert "**Loads without hfcompress: not measured**" in text
    assert "import hfcompress" not in text
    assert "| compressed | not measured | not measured |" in text
    assert load_facts(tmp_path / "plain").after.metrics == {}
    assert "pruned" in ModelCard.load(tmp_path / "plain" / "README.md").data.tags
    assert (tmp_path / "plain" / EDITED).read_text() == "My own words."


def test_a_reload_of_other_weights_is_not_on_the_card(base: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    hfcompress.save_compressed(model, tmp_path / "small", verify=True)
    hfcompress.prune(model, hfcompress.Magnitude(sparsity=0.5))
    model.save_pretrained(tmp_path / "small")
    hfcompress.write_model_card(tmp_path / "small", base_model=base)
    facts = load_facts(tmp_path / "small")
    assert (facts.loads_without_hfcompress, facts.verification) == (None, {})


def test_a_card_says_whose_metrics_are_missing(base: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    before = hfcompress.measure(model, **MEASURING)
    model.save_pretrained(tmp_path / "small")
    card = hfcompress.write_model_card(tmp_path / "small", base_model=base, before=before)
    assert "No metrics of the result are given: none were asked for." in card.read_text()
    card = hfcompress.write_model_card(tmp_path / "small", base_model=base)
    assert "No metrics are given: none were asked for." in card.read_text()


def test_an_edited_card_is_kept_beside_the_next_one(base: str, tmp_path: Path) -> None:
    quantized(base, tmp_path / "small")
    card = tmp_path / "small" / "README.md"
    edited = card.read_text() + "My own words."
    card.write_text(edited)
    hfcompress.write_model_card(tmp_path / "small")
    assert "My own words." not in card.read_text()
    assert (tmp_path / "small" / EDITED).read_text() == edited


def test_without_facts_and_without_a_base_model_the_error_says_both_ways(base: str) -> None:
    with pytest.raises(CheckpointError, match=r"no measurements\.json.*`hfcompress run` writes it.*base_model="):
        hfcompress.write_model_card(base)


def test_the_command_leaves_the_card_of_a_folder_without_measurements(base: str) -> None:
    with pytest.raises(CheckpointError, match=r"no measurements\.json"):
        run_command("card", base)
    assert (Path(base) / "README.md").read_text().endswith("# A model")


@pytest.mark.parametrize("training", [None, {"options": {}}, {"command": ["hfcompress", "prune"]}])
def test_measurements_of_a_run_are_not_replaced(training: Any, base: str, tmp_path: Path) -> None:
    quantized(base, tmp_path / "small")
    values = json.loads((tmp_path / "small" / "measurements.json").read_text())
    values["training"] = training
    (tmp_path / "small" / "measurements.json").write_text(json.dumps(values))
    card = (tmp_path / "small" / "README.md").read_text()
    with pytest.raises(OutputError, match="holds the measurements of a recipe's run"):
        hfcompress.write_model_card(tmp_path / "small", base_model=base)
    assert (tmp_path / "small" / "README.md").read_text() == card


@pytest.mark.parametrize("wrong", [{"repo": "me/x"}, {"metrics": ["perplexity"]}, {"reports": "24 layers"}])
def test_wrong_arguments_are_refused_before_any_work(wrong: dict[str, Any], base: str) -> None:
    with pytest.raises(TypeError, match=r"argument"):
        hfcompress.write_model_card(base, base_model=base, **wrong)


def test_a_classifier_is_reloaded_as_one(tmp_path: Path, bert_dir: Path) -> None:
    batch = {"input_ids": torch.arange(6, 14).unsqueeze(0), "labels": torch.tensor([1])}
    card = hfcompress.write_model_card(
        copied(bert_dir, tmp_path), base_model=str(bert_dir), batches=[batch], metrics=["accuracy"]
    )
    assert load_facts(card.parent).task == "sequence-classification"
    assert load_facts(card.parent).after.metrics["accuracy"] in (0.0, 1.0)


def copied(folder: Path, around: Path) -> Path:
    for file in folder.iterdir():
        (around / file.name).write_bytes(file.read_bytes())
    return around
