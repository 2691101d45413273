"""Recipes close heads and neurons while they train, and a shrink stage removes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from hfcompress.checkpoint.inspect import inspect_checkpoint
from hfcompress.errors import RecipeError
from hfcompress.pipeline import compress
from hfcompress.pruning import HeadPruneOptions, NeuronPruneOptions
from hfcompress.publish.numbers import megabytes, millions, percent
from hfcompress.recipe import Finetune, parse_recipe
from hfcompress.structure import find_attention, find_ffn
from tests.documents import run_card
from tests.runs import language_recipe, run_command

pytestmark = pytest.mark.usefixtures("forked")

TRAINING = {"per_device_train_batch_size": 4, "save_steps": 2, "learning_rate": 1e-3}


def test_distilled_then_shrunk_model_reloads_without_its_heads(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [
        {
            "distill": {
                "steps": 8,
                "prune_heads": {"sparsity": 0.5, "scope": "layer"},
                "prune_neurons": {"sparsity": 0.75},
                "prune": {"sparsity": 0.6, "criterion": "taylor"},
                "training": TRAINING,
            }
        },
        {"shrink": {}},
    ]
    recipe = language_recipe(sources / "llama", sources / "text.jsonl", tmp_path / "out", stages=stages)
    assert parse_recipe(recipe.to_dict()) == recipe
    compress(recipe)
    output = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(output)
    assert [site.heads for site in find_attention(model)] == [2, 2, 2, 2]
    assert sum(block.width for block in find_ffn(model)) == 4 * 128 // 4
    facts = (output / "measurements.json").read_text()
    assert "50.0% of the targeted heads pruned, 75.0% of the targeted neurons pruned, " in facts
    assert "8 heads and 384 neurons removed" in facts
    card = (output / "README.md").read_text()
    assert "- pruned" in card
    (tmp_path / "around").mkdir()
    as_it_says = run_card(output, tmp_path / "around", monkeypatch)
    assert "hfcompress" in as_it_says, "stock Transformers does not load uneven shapes"
    assert [block.width for block in find_ffn(as_it_says["model"])] == [block.width for block in find_ffn(model)]
    summary = inspect_checkpoint(output)
    assert len(summary.layers) == 4
    for layer in summary.layers:
        sizes = [millions(layer.parameters), percent(layer.sparsity), f"{layer.bits_per_weight:.2f}"]
        assert f"| {' | '.join([layer.name, *sizes, megabytes(layer.bytes)])} |" in card
    shown = run_command("inspect", output)
    assert "uneven shapes" in shown
    assert all(name in "".join(shown.split()) for name in summary.uneven)
    assert any(".mlp." in name for name in summary.uneven)


def test_stages_without_pruning_have_none_of_its_options() -> None:
    assert (Finetune(steps=1).prune_heads, Finetune(steps=1).prune_neurons) == (None, None)
    options = {"steps": 1, "prune_heads": {"grouped": "even"}, "prune_neurons": {"criterion": "activation"}}
    mapping = {"model": {"id": "a/b"}, "data": {"id": "a/b"}, "name": "n", "task": "causal-lm"}
    (stage,) = parse_recipe({**mapping, "stages": [{"finetune": options}]}).stages
    assert isinstance(stage.options, Finetune)
    assert stage.options.prune_heads == HeadPruneOptions(grouped="even")
    assert stage.options.prune_neurons == NeuronPruneOptions(criterion="activation")


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ({"shrink": {"to": 3}}, "unknown option 'to'"),
        ({"finetune": {"steps": 1, "prune_heads": {"sparsity": 1.0}}}, "must be less than 1, not 1"),
        ({"finetune": {"steps": 1, "prune_neurons": {"grouped": "even"}}}, "unknown option 'grouped'"),
        ({"finetune": {"steps": 1, "prune_head": {}}}, r"unknown option 'prune_head' \(prune_heads\?\)"),
        ({"finetune": {"steps": 1, "prune_heads": {"criterion": "movement"}}}, "not one of taylor, magnitude"),
        ({"finetune": {"steps": 1, "prune_heads": {"schedule": "constant"}}}, "criterion='taylor' has seen nothing"),
    ],
)
def test_faults_are_named(stage: dict[str, Any], fault: str) -> None:
    mapping = {"model": {"id": "a/b"}, "data": {"id": "a/b"}, "name": "n", "task": "causal-lm", "stages": [stage]}
    with pytest.raises(RecipeError, match=fault):
        parse_recipe(mapping)
