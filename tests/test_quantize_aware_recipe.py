"""A recipe's stage trains, prunes and trains for few bits at once, and stores what it trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hfcompress.errors import RecipeError
from hfcompress.pipeline import compress
from hfcompress.recipe import parse_recipe
from tests.runs import language_recipe

pytestmark = pytest.mark.usefixtures("forked")

TRAINING = {"per_device_train_batch_size": 4, "save_steps": 2, "learning_rate": 1e-3}
MAPPING = {"model": {"id": "a/b"}, "data": {"id": "a/b"}, "name": "n", "task": "causal-lm"}


def test_one_stage_distils_prunes_and_packs(sources: Path, tmp_path: Path) -> None:
    stage = {
        "steps": 6,
        "prune": {"sparsity": 0.5},
        "quantize_aware": {"bits": 4, "group_size": 32},
        "on_policy": {"fraction": 0.5, "max_new_tokens": 4, "prompt_tokens": 4},
        "training": TRAINING,
    }
    recipe = language_recipe(sources / "llama", sources / "text.jsonl", tmp_path / "out", stages=[{"distill": stage}])
    assert parse_recipe(recipe.to_dict()) == recipe
    compress(recipe)
    facts = json.loads((tmp_path / "out" / "measurements.json").read_text())
    assert "50.0% of the targeted weights pruned, trained for RTN, 4 bits, a scale per 32 columns" in str(
        facts["stages"]
    )
    assert len(facts["quantization_report"]) == 28
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = [one.weight for one in model.model.layers.modules() if isinstance(one, nn.Linear)]
    assert len(weights) == 28
    assert all(len(group.unique()) <= 16 for weight in weights for group in weight.view(-1, 32)[:50])
    assert float((torch.cat([one.flatten() for one in weights]) == 0).float().mean()) >= 0.5
    tags = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert all(f"- {tag}" in tags for tag in ("pruned", "distilled", "quantized"))


@pytest.mark.parametrize(
    ("stages", "fault"),
    [
        (
            [{"finetune": {"steps": 1, "quantize_aware": {}}}, {"quantize": {"method": "rtn"}}],
            r"stages\[1\]: only one quantize stage is allowed, and stages\[0\] is one",
        ),
        (
            [{"distill": {"steps": 1, "quantize_aware": {}}}, {"finetune": {"steps": 1}}],
            r"stages\[0\]: a stage with quantize_aware must be the last stage",
        ),
        (
            [{"finetune": {"steps": 1, "quantize_aware": {}}}, {"distill": {"steps": 1, "quantize_aware": {}}}],
            r"stages\[1\]: only one stage may quantize, and stages\[0\] is one",
        ),
        ([{"finetune": {"steps": 1, "quantize_aware": {"bit": 4}}}], r"unknown option 'bit' \(bits\?\)"),
        ([{"distill": {"steps": 1, "on_policy": {}}}], "on_policy needs prompt_tokens"),
        ([{"distill": {"steps": 1, "on_policy": {"fraction": 2}}}], "fraction: must be at most 1, not 2"),
    ],
)
def test_faults_are_named(stages: list[dict[str, Any]], fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        parse_recipe({**MAPPING, "stages": stages})


def test_texts_longer_than_the_model_are_refused_before_the_first_stage(sources: Path, tmp_path: Path) -> None:
    stage = {"steps": 1, "on_policy": {"max_new_tokens": 126, "prompt_tokens": 4}, "training": TRAINING}
    recipe = language_recipe(sources / "llama", sources / "text.jsonl", tmp_path / "out", stages=[{"distill": stage}])
    with pytest.raises(RecipeError, match=r"distill.on_policy.prompt_tokens with max_new_tokens is 130 tokens"):
        compress(recipe)
    assert not (tmp_path / "out").exists()
