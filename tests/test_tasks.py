"""What a task knows of its models: how long rows may be, and how they are padded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from hfcompress.errors import RecipeError
from hfcompress.job import Source
from hfcompress.pipeline import compress
from hfcompress.recipe import DataSpec, parse_recipe
from hfcompress.structure.lengths import longest_input
from hfcompress.tasks import TASKS
from tests.conftest import SPECIAL, WORDS, tiny_gpt2_classifier, word_tokenizer
from tests.runs import write_reviews
from tests.tiny_tasks import TINY, heard

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
}
TABLES = {
    "bert": hf.BertConfig(**SMALL, max_position_embeddings=24),
    "roberta": hf.RobertaConfig(**SMALL, max_position_embeddings=24),
    "xlm-roberta": hf.XLMRobertaConfig(**SMALL, max_position_embeddings=24),
    "mpnet": hf.MPNetConfig(**SMALL, max_position_embeddings=24),
    "roberta, other padding": hf.RobertaConfig(**SMALL, max_position_embeddings=24, pad_token_id=3),
    "gpt2": hf.GPT2Config(vocab_size=40, n_positions=24, n_embd=32, n_layer=1, n_head=2),
    "opt": hf.OPTConfig(
        vocab_size=40, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, word_embed_proj_dim=32),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_the_longest_row_is_the_longest_that_the_model_takes(name: str) -> None:
    """One token more is past the end of the table of positions, whatever place its first row has."""
    config = TABLES[name]
    limit = longest_input(config)
    assert limit is not None
    model = hf.AutoModel.from_config(config).eval()
    with torch.no_grad():
        model(torch.full((1, limit), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, limit + 1), 7))


@pytest.mark.parametrize(
    "config",
    [
        hf.BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=2),
        hf.T5Config(vocab_size=40, d_model=32, d_ff=32, num_layers=1, num_heads=2),
        hf.XLNetConfig(vocab_size=40, d_model=32, n_layer=1, n_head=2, d_inner=32),
        hf.MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1),
    ],
    ids=lambda config: config.model_type,
)
def test_models_without_positions_have_no_limit(config: hf.PreTrainedConfig) -> None:
    assert longest_input(config) is None


def test_a_limit_of_null_is_none() -> None:
    config = hf.LlamaConfig(**SMALL)
    vars(config)["max_position_embeddings"] = None  # as configs of other libraries write it
    assert longest_input(config) is None


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("padding", ["[PAD]", None], ids=["own padding token", "end token"])
def test_a_decoder_without_a_padding_token_classifies_batches(tmp_path: Path, padding: str | None) -> None:
    """Its answer for a row does not depend on what the row is padded with or beside."""
    tokenizer = word_tokenizer(WORDS)
    tokenizer.pad_token = padding
    model = tiny_gpt2_classifier()
    assert model.config.pad_token_id is None
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    write_reviews(tmp_path / "reviews.tsv", rows=40)
    recipe = parse_recipe(
        {
            "name": "tiny",
            "task": "sequence-classification",
            "model": {"id": str(tmp_path / "gpt2")},
            "data": {"files": str(tmp_path / "reviews.tsv"), "max_length": 16},
            "output": str(tmp_path / "out"),
            "stages": [{"distill": {"steps": 1, "training": {"per_device_train_batch_size": 4}}}],
        }
    )
    source = Source(recipe)
    model = source.open_original()
    rows = [{"input_ids": [7, 8, 9]}, {"input_ids": [7, 8, 9, 10, 11, 12]}]
    together = source.task.collator(source.processor, recipe.data)(rows)
    with torch.no_grad():
        logits = model(**together).logits
        for row, found in zip(rows, logits):
            alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    folder = compress(recipe)
    written = json.loads((folder / "config.json").read_text())
    assert written["pad_token_id"] == SPECIAL.index("[PAD]" if padding else "</s>")


def test_the_start_of_a_transcript_is_left_to_the_model() -> None:
    """Whisper puts its start token before the labels itself; its tokenizer's bos_token is another."""
    processor = heard()
    processor.tokenizer.prefix_tokens = [7, 8]
    rows = [{"input_features": np.zeros((8, 32)), "labels": labels} for labels in ([7, 8, 9], [7, 8])]
    batch = TASKS["speech-seq2seq"].collator(processor, DataSpec(id="none"))(rows)
    assert batch["labels"].tolist() == [[8, 9], [8, -100]]


def flat(values: Any) -> Iterator[int]:
    for value in values:
        yield from flat(value) if isinstance(value, list) else [value]


@pytest.mark.parametrize("name", ["token-classification", "question-answering", "multiple-choice", "seq2seq-lm"])
def test_a_smaller_vocabulary_has_every_token_of_the_training_rows(name: str, tmp_path: Path) -> None:
    source = Source(TINY[name].recipe(tmp_path))
    known = {token for text in source.texts() for token in source.processor(text)["input_ids"]}
    rows = source.encoded("train")
    shown = set(flat(rows["input_ids"])) | (set(flat(rows["labels"])) if name == "seq2seq-lm" else set())
    assert len(shown) > 10
    assert shown <= known


@pytest.mark.parametrize("name", ["image-classification", "sentence-embeddings"])
def test_tasks_without_a_vocabulary_of_their_own_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"stages.0.: is not for {name}"):
        TINY[name].recipe(tmp_path, stages=[{"prune_vocabulary": {}}])
