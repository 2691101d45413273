"""The main path: a recipe ends in a checkpoint that loads anywhere, and a killed run ends in the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from hfcompress.checkpoint import inspect_checkpoint
from hfcompress.checkpoint.files import weights_digest
from hfcompress.errors import OutputError
from hfcompress.pipeline import compress
from hfcompress.publish import load_facts
from hfcompress.recipe import Recipe, load_recipe, parse_recipe
from tests.conftest import tiny_bert
from tests.forks import Forks
from tests.here import compress_here
from tests.runs import language_recipe, model_files, write_reviews


def test_result_loads_with_three_lines_and_generates(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    prompt = tokenizer("the model", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] == prompt["input_ids"].shape[1] + 3
    assert model.config.num_hidden_layers == 2
    assert model.config.use_cache is True


def test_result_holds_everything_and_no_scratch(finished: Path, sources: Path) -> None:
    names = {file.name for file in finished.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "measurements.json"} <= names
    assert {"recipe.yaml", "hfcompress.json", "quantization_report.json"} <= names
    assert "stage.json" not in names
    assert sorted(path.name for path in sources.iterdir()) == ["llama", "out", "text.jsonl"]
    assert load_recipe(finished / "recipe.yaml").output == str(finished)


def test_measurements_are_of_the_files_on_disk(finished: Path) -> None:
    facts = json.loads((finished / "measurements.json").read_text())
    assert [stage["name"] for stage in facts["stages"]] == ["original", "drop_layers", "distill", "quantize"]
    last = facts["stages"][-1]["measurement"]
    summary = inspect_checkpoint(finished)
    assert last["parameters"] == summary.total.parameters
    assert last["nonzero"] == summary.total.nonzero
    assert last["bytes_on_disk"] == (finished / "model.safetensors").stat().st_size
    assert facts["weights"] == weights_digest(finished)
    assert facts["loads_without_hfcompress"] is True
    assert facts["verification"]["stock"]["max_logit_difference"] == 0.0
    assert all(stage["measurement"]["metrics"]["perplexity"] > 1 for stage in facts["stages"])
    assert len(facts["quantization_report"]) == 2 * 7


def test_pruned_weights_stay_zero_through_quantization(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished)
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.long))  # the stock loader unpacks at the first forward
    weights = [m.weight for name, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros >= 0.5 - 1e-4


def test_a_finished_output_is_not_overwritten_unasked(finished: Path, sources: Path) -> None:
    before = model_files(finished)
    recipe = language_recipe(sources / "llama", sources / "text.jsonl", finished)
    with pytest.raises(OutputError, match="holds a finished result"):
        compress(recipe)
    with pytest.raises(OutputError, match="holds a finished result"):
        compress(language_recipe(sources / "llama", sources / "text.jsonl", finished, seed=1), resume=True)
    assert compress(recipe, resume=True) == finished
    assert model_files(finished) == before


def reviews_recipe(folder: Path, output: str, stages: list[dict[str, Any]]) -> Recipe:
    return parse_recipe(
        {
            "name": "tiny",
            "task": "sequence-classification",
            "model": {"id": str(folder / "encoder")},
            "data": {"files": str(folder / "reviews.tsv"), "max_length": 16},
            "output": str(folder / output),
            "stages": stages,
        }
    )


def test_classification_from_an_encoder_without_a_head(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, forks: Forks
) -> None:
    tiny_bert().bert.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    write_reviews(tmp_path / "reviews.tsv", rows=400)
    training = {"per_device_train_batch_size": 16, "learning_rate": 5e-3}
    stages: list[dict[str, Any]] = [
        {"finetune": {"epochs": 3, "training": training}},
        {"distill": {"teacher": "finetune", "epochs": 2, "prune": {"sparsity": 0.8}, "training": training}},
        {"quantize": {"method": "rtn", "bits": 8}},
    ]
    (tmp_path / "recipe.yaml").write_text(reviews_recipe(tmp_path, "out", stages).to_yaml())
    run = forks.hfcompress("run", tmp_path / "recipe.yaml")
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "out"
    facts = json.loads((folder / "measurements.json").read_text())
    accuracy = [stage["measurement"]["metrics"].get("accuracy") for stage in facts["stages"]]
    assert accuracy[0] is None  # its head was never trained
    assert min(accuracy[1:]) > 0.95
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "0", 1: "1"}
    layers = inspect_checkpoint(folder).layers
    share = 1 - sum(layer.nonzero for layer in layers) / sum(layer.parameters for layer in layers)
    assert share > 0.75


def test_a_card_carries_the_base_models_licence(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_bert().save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A model")
    write_reviews(tmp_path / "reviews.tsv")
    stages: list[dict[str, Any]] = [{"quantize": {"method": "rtn", "bits": 8}}]
    folder = compress_here(reviews_recipe(tmp_path, "out", stages), monkeypatch)
    assert ModelCard.load(folder / "README.md").data.license == "cc-by-4.0"
    assert load_facts(folder).local == (str(tmp_path / "encoder"),)


SEEDED = """
import sys, torch
torch.manual_seed(int(sys.argv[2]))
from hfcompress.pipeline import compress
from hfcompress.recipe import load_recipe
compress(load_recipe(sys.argv[1]))
"""


def test_a_new_head_is_the_same_in_every_run(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, forks: Forks) -> None:
    """Also the first weights of an untrained head come from the recipe's seed."""
    tiny_bert().bert.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    write_reviews(tmp_path / "reviews.tsv")
    for name, seed in (("one", "3"), ("two", "99")):
        recipe = reviews_recipe(tmp_path, name, [{"finetune": {"steps": 2}}])
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        run = forks.run(["-c", SEEDED, str(tmp_path / "recipe.yaml"), seed])
        assert run.returncode == 0, run.stderr
    assert model_files(tmp_path / "one") == model_files(tmp_path / "two")
