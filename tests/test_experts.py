"""Mixtures of experts whose experts are slices of one tensor: never left dense without a word."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig

import hfcompress
from hfcompress.errors import ModelError
from tests.conftest import VOCABULARY_SIZE, token_batches

COMMON = {"vocab_size": VOCABULARY_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
MIXTURES = {
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(**COMMON, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2),
}
METHODS = [hfcompress.RTN(), hfcompress.GPTQ(group_size=16), hfcompress.BitsAndBytes(bits=8), hfcompress.Float8()]


def mixture(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MIXTURES[name]()).eval()


@pytest.mark.parametrize("method", METHODS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("name", MIXTURES)
def test_fused_experts_are_named_instead_of_staying_dense_silently(name: str, method: object) -> None:
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts holds its experts as slices of one tensor"):
        hfcompress.quantize(mixture(name), method, calibration=token_batches(count=1))
    if not isinstance(method, hfcompress.BitsAndBytes):  # nor would Transformers read them dense beside packed layers
        excluding = dataclasses.replace(method, exclude=("*.experts",))
        with pytest.raises(ModelError, match="no compressed-tensors checkpoint in which experts are dense"):
            hfcompress.quantize(mixture(name), excluding, calibration=token_batches(count=1))


@pytest.mark.parametrize("name", MIXTURES)
def test_with_experts_left_dense_on_request_it_reloads(name: str, tmp_path: Path) -> None:
    model = mixture(name)
    report = hfcompress.quantize(model, hfcompress.BitsAndBytes(bits=8, exclude=("*.experts",)))
    assert not any(".experts" in row.name for row in report.rows)
    assert any("self_attn.q_proj" in row.name for row in report.rows)
    inputs = {"input_ids": token_batches(count=1)[0]["input_ids"]}
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path)(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
