"""Tokenizer classes that build themselves from a vocabulary, or keep ids of languages: all must follow the new ids."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from hfcompress.vocabulary import prune_vocabulary
from tests.vocabularies import CORPUS, ELSEWHERE, SMALL, ids_of, merges_of, pieces, trained

FAIRSEQ = ["<s>", "<pad>", "</s>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _special(*names: str) -> list[tuple[str, float]]:
    return [(name, 0.0) for name in names]


def _unigram(kind: Any, first: list[str], last: tuple[str, ...] = (), **options: Any) -> Callable[[], Any]:
    return lambda: kind(vocab=[*_special(*first), *pieces(), *_special(*last)], **options)


def _merging(kind: Any, trained_as: str, first: list[str], **options: Any) -> Callable[[], Any]:
    return lambda: kind(vocab=ids_of([*first, *trained(trained_as)["vocab"]]), merges=merges_of(trained_as), **options)


MAKERS: dict[str, Callable[[], Any]] = {
    "albert": _unigram(hf.AlbertTokenizer, ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]),
    "camembert": _unigram(
        hf.CamembertTokenizer, ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"], ("<mask>",)
    ),
    "deberta_v2": _unigram(hf.DebertaV2Tokenizer, ["[PAD]", "[CLS]", "[SEP]", "[UNK]"], ("[MASK]",)),
    "gemma": _merging(hf.GemmaTokenizer, "metaspace", ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES]),
    "mbart": _unigram(hf.MBartTokenizer, FAIRSEQ, src_lang="en_XX", tgt_lang="de_DE"),
    "mbart50": _unigram(hf.MBart50Tokenizer, FAIRSEQ, src_lang="en_XX"),
    "mpnet": lambda: hf.MPNetTokenizer(
        vocab=ids_of([*FAIRSEQ[:3], "[UNK]", *[t for t in trained("wordpiece")["vocab"] if t[0] != "["], "<mask>"])
    ),
    "nllb": _merging(hf.NllbTokenizer, "metaspace", FAIRSEQ, src_lang="eng_Latn", tgt_lang="deu_Latn"),
    "pegasus": _unigram(
        hf.PegasusTokenizer, ["<pad>", "</s>", "<mask_1>", "<mask_2>", *(f"<unk_{i}>" for i in range(2, 103)), "<unk>"]
    ),
    "qwen2": _merging(hf.Qwen2Tokenizer, "bytelevel", ["<|endoftext|>"]),
    "whisper": _merging(hf.WhisperTokenizer, "bytelevel", ["<|endoftext|>"]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_tokens_logits_reloads_and_language_ids_follow(name: str, tmp_path: Path) -> None:
    tokenizer = MAKERS[name]()
    rows = max(tokenizer.get_vocab().values()) + 1
    model = hf.LlamaModel(hf.LlamaConfig(vocab_size=rows, pad_token_id=tokenizer.pad_token_id, **SMALL)).eval()
    old, before = copy.deepcopy(tokenizer), model.embed_tokens.weight.clone()
    report = prune_vocabulary(model, tokenizer, CORPUS)
    assert report.rows_after < 0.75 * rows
    assert torch.equal(model.embed_tokens.weight, before[report.old_ids])
    tokenizer.save_pretrained(tmp_path)
    reloaded = type(tokenizer).from_pretrained(tmp_path)
    for text in CORPUS:
        assert report.old_ids[tokenizer(text)["input_ids"]].tolist() == old(text)["input_ids"]
    for text in [*CORPUS, *ELSEWHERE]:
        assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == old.decode(old(text)["input_ids"])
    if hasattr(tokenizer, "lang_code_to_id"):
        assert len(tokenizer.lang_code_to_id) > 20
        for code, index in old.lang_code_to_id.items():
            assert report.old_ids[tokenizer.lang_code_to_id[code]] == index
    if hasattr(tokenizer, "set_src_lang_special_tokens"):
        language = "deu_Latn" if name == "nllb" else "de_DE"
        for one in (old, tokenizer):
            one.src_lang = language
        assert report.old_ids[tokenizer(CORPUS[0])["input_ids"]].tolist() == old(CORPUS[0])["input_ids"]
