"""A recipe stage that prunes the vocabulary: later stages and the card work with the new tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from hfcompress.errors import ModelError
from hfcompress.pipeline import compress
from hfcompress.recipe import parse_recipe
from tests.runs import language_recipe, write_reviews, write_text
from tests.vocabularies import gpt2_tokenizer

pytestmark = pytest.mark.usefixtures("forked")

STEP = {"per_device_train_batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer of 700 tokens, most of which the texts of the tests never use."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    tokenizer = gpt2_tokenizer()
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_later_stages_train_and_measure_with_the_new_tokenizer(llama: Path, tmp_path: Path) -> None:
    stages = [
        {"prune_vocabulary": {"keep": ["Ġliteral"]}},
        {"finetune": {"steps": 2, "training": STEP}},
        {"distill": {"steps": 2, "teacher": "prune_vocabulary", "training": STEP}},
    ]
    recipe = language_recipe(llama, write_text(tmp_path / "text.jsonl"), tmp_path / "out", stages=stages)
    assert parse_recipe(recipe.to_dict()) == recipe
    compress(recipe)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    old = hf.AutoTokenizer.from_pretrained(llama)
    assert 256 < len(tokenizer) == len(model.get_input_embeddings().weight) < len(old) - 100
    assert "Ġliteral" in tokenizer.get_vocab()
    assert tokenizer.tokenize("the model prune") == old.tokenize("the model prune")
    facts = json.loads((tmp_path / "out" / "measurements.json").read_text())
    assert f"{len(tokenizer)} of {len(old)} tokens kept" in json.dumps(facts)
    # The same tokens of the same texts, so only the sum over fewer tokens tells the two apart.
    before, after = (row["measurement"]["metrics"]["perplexity"] for row in facts["stages"][:2])
    assert 0.4 * before < after < before


def test_tokenizer_that_cannot_be_pruned_is_refused_before_the_first_stage(bert_dir: Path, tmp_path: Path) -> None:
    stages = [{"finetune": {"steps": 2, "training": STEP}}, {"prune_vocabulary": {}}]
    data = {"files": str(write_reviews(tmp_path / "r.tsv")), "max_length": 32}
    mapping = {"name": "tiny", "task": "sequence-classification", "model": {"id": str(bert_dir)}, "stages": stages,
               "data": data, "output": str(tmp_path / "out")}  # fmt: skip
    with pytest.raises(ModelError, match="WordLevel"):
        compress(parse_recipe(mapping))
    assert not (tmp_path / "out").exists()
