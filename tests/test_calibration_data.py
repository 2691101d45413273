"""Calibration data of every form become the batches that they stand for, or are refused with what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

import hfcompress
from hfcompress.calibration.texts import batches_for, pack
from hfcompress.errors import DataError
from tests.conftest import tiny_bert, tiny_llama, token_batches
from tests.runs import WORDS

TEXTS = [" ".join(WORDS[start : start + 7]) for start in range(12)]
METHODS = {"quantize": hfcompress.GPTQ(group_size=32), "prune": hfcompress.SparseGPT()}


def as_dataset(folder: Path) -> Dataset:
    return Dataset.from_dict({"text": TEXTS, "number": range(len(TEXTS))})


def as_file(suffix: str) -> Any:
    def write(folder: Path) -> Path:
        file = folder / f"texts{suffix}"
        rows = as_dataset(folder)
        {".csv": rows.to_csv, ".jsonl": rows.to_json, ".parquet": rows.to_parquet}[suffix](str(file))
        return file

    return write


def as_dataset_folder(folder: Path) -> str:
    """A dataset's id that needs no Hub: the datasets library opens a folder's name by the same way as an id."""
    file: Path = as_file(".jsonl")(folder)
    place = folder / "corpus"
    place.mkdir()
    file.rename(place / "train.jsonl")
    return str(place)


FORMS: dict[str, Any] = {
    "texts": lambda folder: TEXTS,
    "generator": lambda folder: (text for text in TEXTS),
    "dataset": as_dataset,
    "streamed dataset": lambda folder: as_dataset(folder).to_iterable_dataset(),
    "splits": lambda folder: {"train": as_dataset(folder)},
    **{suffix: as_file(suffix) for suffix in (".csv", ".jsonl", ".parquet")},
    "file name": lambda folder: str(as_file(".jsonl")(folder)),
    "dataset's id": as_dataset_folder,
}


def stream(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [token for text in TEXTS for token in (*tokenizer(text, add_special_tokens=False).input_ids, 5)]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_text_gives_the_same_full_rows(
    form: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found = hfcompress.calibration_batches(FORMS[form](tmp_path), tokenizer, length=10)
    rows = torch.cat([batch["input_ids"] for batch in found])
    assert rows.flatten().tolist() == stream(tokenizer)[: 12 * 8 // 10 * 10]
    assert [set(batch) for batch in found] == [{"input_ids"}] * len(found)


def test_text_that_is_not_needed_is_not_read(tokenizer: PreTrainedTokenizerFast) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield TEXTS[0]

    found = hfcompress.calibration_batches(endless(), tokenizer, rows=20, length=16)
    assert [len(batch["input_ids"]) for batch in found] == [8, 8, 4]
    assert pack(TEXTS, tokenizer, 10, count=3) == pack(TEXTS, tokenizer, 10)[:3]


def test_texts_that_are_not_packed_keep_their_ends_and_masks(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [TEXTS[0], "river", TEXTS[1]]
    (batch,) = hfcompress.calibration_batches(texts, tokenizer, length=5, packed=False)
    assert batch["attention_mask"].sum(1).tolist() == [5, 1, 5]
    for row, mask, text in zip(batch["input_ids"], batch["attention_mask"], texts):
        assert row[mask.bool()].tolist() == tokenizer(text, truncation=True, max_length=5).input_ids


def test_rows_of_token_ids_are_taken_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"input_ids": [[6, 7, 8], [9], [10, 11, 12]], "source": ["a", "b", "c"]})
    single = hfcompress.calibration_batches(rows)
    assert [batch["input_ids"].tolist() for batch in single] == [[[6, 7, 8]], [[9]], [[10, 11, 12]]]
    (padded,) = hfcompress.calibration_batches(rows, tokenizer)
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("action", METHODS)
def test_texts_with_a_tokenizer_compress_as_their_batches_do(
    action: str, tokenizer: PreTrainedTokenizerFast, llama_dir: Path
) -> None:
    """The model's own folder has its tokenizer; rows are as long as the model takes at most, 64 by this tokenizer."""
    texts = TEXTS * 12
    forms = [
        ({"calibration": hfcompress.calibration_batches(texts, tokenizer, length=64)}),
        ({"calibration": texts, "processor": tokenizer}),
        ({"calibration": iter(texts)}),
    ]
    errors = []
    for form in forms:
        model = AutoModelForCausalLM.from_pretrained(llama_dir)
        report = getattr(hfcompress, action)(model, METHODS[action], **form)
        errors.append([(row.name, row.tokens, row.relative_error) for row in report.rows])
    assert errors[0] == errors[1] == errors[2]
    assert errors[0][0][1] == len(stream(tokenizer)) * 12 // 64 * 64


def test_an_encoder_sees_each_text_for_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = batches_for(tiny_bert(), "GPTQ", TEXTS[:3], tokenizer)
    assert [batch["input_ids"].shape for batch in batches] == [(3, 7)]


def test_batches_stay_what_they_are() -> None:
    batches = token_batches(2)
    assert batches_for(tiny_llama(), "GPTQ", iter(batches), None) == batches


def tiny_bart() -> BartForConditionalGeneration:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXTS[:1], "calibration texts have less than 64 tokens together"),
        ([*TEXTS, 7], r"calibration text 12 is no text but int"),
        (Dataset.from_dict({"txt": TEXTS}), "no column 'text'. Did you mean 'txt'"),
        (Path("nothing.jsonl"), r"No such data file: nothing\.jsonl"),
        ("nothing/here", "Data 'nothing/here' cannot be opened"),
        ([], "calibration has 0 batches"),
        (None, "GPTQ needs calibration"),
    ],
)
def test_wrong_data_are_refused(data: Any, message: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=message):
        batches_for(tiny_llama(), "GPTQ", data, tokenizer)


def test_texts_without_a_tokenizer_or_targets_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"Texts need a tokenizer .* give processor=tokenizer"):
        batches_for(tiny_llama(), "GPTQ", TEXTS, None)
    with pytest.raises(DataError, match="BartForConditionalGeneration reads inputs and targets"):
        batches_for(tiny_bart(), "GPTQ", TEXTS, tokenizer)
