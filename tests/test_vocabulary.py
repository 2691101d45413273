"""Pruned vocabularies: same tokens and same logits on the texts, nothing lost elsewhere, plain reloads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from hfcompress.vocabulary import PrunedVocabulary, prune_vocabulary
from tests.vocabularies import CASES, CORPUS, ELSEWHERE


@pytest.fixture(scope="module", params=CASES)
def pruned(request: pytest.FixtureRequest) -> tuple[str, Any, Any, Any, Any, PrunedVocabulary]:
    """Return (name, model and tokenizer before, model and tokenizer after, report)."""
    before = CASES[request.param].make()
    after = copy.deepcopy(before)
    return request.param, *before, *after, prune_vocabulary(*after, iter(CORPUS))


def _strings(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, verbose=False)["input_ids"])


@torch.no_grad()
def _outputs(model: Any, tokenizer: Any, texts: list[str], is_seq2seq: bool) -> Tensor:
    """Return logits (or text embeddings) of the first 40 tokens of the texts."""
    inputs = tokenizer(texts, truncation=True, max_length=40, return_tensors="pt")
    if is_seq2seq:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    outputs = model(**inputs)
    return outputs.logits if "logits" in outputs else outputs.text_embeds


def test_texts_have_the_same_tokens_and_the_same_logits(pruned: tuple) -> None:
    name, old_model, old, model, tokenizer, report = pruned
    assert report.rows_before > report.rows_after == len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert report.parameters_after == model.num_parameters() < report.parameters_before == old_model.num_parameters()
    for text in CORPUS:
        assert _strings(tokenizer, text) == _strings(old, text)
        assert report.old_ids[tokenizer(text)["input_ids"]].tolist() == old(text)["input_ids"]
        expected = _outputs(old_model, old, [text], CASES[name].is_seq2seq)
        found = _outputs(model, tokenizer, [text], CASES[name].is_seq2seq)
        per_token = expected.shape[-1] == report.rows_before
        torch.testing.assert_close(found, expected[..., report.old_ids] if per_token else expected)


def test_other_texts_are_still_encoded_and_decoded(pruned: tuple) -> None:
    name, _, old, _, tokenizer, _ = pruned
    shorter = 0
    for text in ELSEWHERE:
        before, after = old(text, verbose=False)["input_ids"], tokenizer(text, verbose=False)["input_ids"]
        shorter += len(before) < len(after)
        assert tokenizer.decode(after) == old.decode(before)
        if old.unk_token_id is not None:
            assert after.count(tokenizer.unk_token_id) == before.count(old.unk_token_id)
    assert shorter > 0
    if name in ("gpt2", "llama3", "roberta-masked", "llama2"):
        assert tokenizer.decode(tokenizer(ELSEWHERE[-1])["input_ids"], skip_special_tokens=True) == ELSEWHERE[-1]


def test_special_and_added_tokens_and_the_chat_template_stay(pruned: tuple) -> None:
    _, _, old, _, tokenizer, report = pruned
    assert tokenizer.special_tokens_map == old.special_tokens_map
    assert tokenizer.added_tokens_encoder.keys() == old.added_tokens_encoder.keys()
    for name, token in old.special_tokens_map.items():
        assert getattr(tokenizer, f"{name}_id", None) == tokenizer.convert_tokens_to_ids(token)
    for token, index in old.added_tokens_encoder.items():
        assert report.old_ids[tokenizer.convert_tokens_to_ids(token)] == index
        assert tokenizer.decode(tokenizer(token, add_special_tokens=False)["input_ids"]).strip() == token
    assert tokenizer.chat_template == old.chat_template
    if tokenizer.chat_template:
        messages = [{"role": "system", "content": "the"}, {"role": "user", "content": CORPUS[0]}]
        options = {"add_generation_prompt": True, "return_dict": False}
        ids = tokenizer.apply_chat_template(messages, **options)
        assert report.old_ids[ids].tolist() == old.apply_chat_template(messages, **options)


def test_model_and_tokenizer_reload_with_plain_from_pretrained(pruned: tuple, tmp_path: Path) -> None:
    name, _, _, model, tokenizer, _ = pruned
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    auto = CASES[name].auto
    new_model, notes = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    new = hf.AutoTokenizer.from_pretrained(tmp_path)
    assert new.get_vocab() == tokenizer.get_vocab()
    for text in [*CORPUS, *ELSEWHERE]:
        assert new(text, verbose=False)["input_ids"] == tokenizer(text, verbose=False)["input_ids"]
    is_seq2seq = CASES[name].is_seq2seq
    assert torch.equal(
        _outputs(new_model, new, CORPUS[:1], is_seq2seq), _outputs(model, tokenizer, CORPUS[:1], is_seq2seq)
    )
    for parameter, reloaded in zip(model.parameters(), new_model.parameters()):
        assert torch.equal(parameter, reloaded)


def test_a_second_run_removes_nothing(pruned: tuple) -> None:
    _, _, _, model, tokenizer, report = pruned
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = prune_vocabulary(model, tokenizer, CORPUS)
    assert again.rows_after == again.rows_before == report.rows_after
    assert again.old_ids.tolist() == list(range(report.rows_after))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_id_of_the_configs_names_the_same_token(pruned: tuple) -> None:
    _, old_model, old, model, tokenizer, report = pruned
    pairs = [(old_model.config, model.config)]
    if hasattr(model, "generation_config"):
        pairs.append((old_model.generation_config, model.generation_config))
    for was, now in pairs:
        for name, value in vars(was).items():
            if name.endswith("token_id") and value is not None:
                assert old.convert_ids_to_tokens(value) == tokenizer.convert_ids_to_tokens(getattr(now, name)), name
    assert model.config.vocab_size == report.rows_after
    embedding = model.get_input_embeddings()
    if embedding.padding_idx is not None:
        assert embedding.padding_idx == model.config.pad_token_id


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama3-tied", "llama2", "bart", "t5"])
def test_greedy_generation_gives_the_same_text(name: str) -> None:
    model, tokenizer = CASES[name].make()
    prompt = tokenizer(CORPUS[0], truncation=True, max_length=12, return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 1}
    rows = range(len(tokenizer), model.config.vocab_size)
    produced = model.generate(**prompt, **options, suppress_tokens=list(rows) or None)[0].tolist()
    assert len(set(produced)) > 3
    report = prune_vocabulary(model, tokenizer, CORPUS, keep_extra=produced)
    prompt = tokenizer(CORPUS[0], truncation=True, max_length=12, return_tensors="pt")
    # every token that led the old run is there, so the best of the kept ones is the best of all
    assert report.old_ids[model.generate(**prompt, **options)[0]].tolist() == produced
