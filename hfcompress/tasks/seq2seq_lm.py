"""Texts into texts: summaries, translations, titles."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, ClassVar

from datasets import Dataset
from torch import nn
from transformers import DataCollatorForSeq2Seq, PreTrainedConfig

from hfcompress.errors import DataError, ModelError, did_you_mean
from hfcompress.evaluate import Reader
from hfcompress.evaluate.metrics import Form
from hfcompress.evaluate.modes import on_device
from hfcompress.evaluate.readers import Found, both
from hfcompress.outputs import Outputs
from hfcompress.recipe import DataSpec
from hfcompress.tasks.base import Head, HeldOut, Task, mapped

TRANSLATION = "translation"


class Seq2SeqLM(Task):
    """Write a target for a source; trained with the right target so far before its eyes (teacher forcing)."""

    name = "seq2seq-lm"
    auto_class = "AutoModelForSeq2SeqLM"
    metrics = ("perplexity",)
    predicts_tokens: ClassVar[bool] = True

    def columns(self, spec: DataSpec) -> list[str]:
        """Return the columns of sources and targets, or the one of translations."""
        return [TRANSLATION] if spec.source_lang else [str(spec.text_column), str(spec.summary_column)]

    def check(self, config: PreTrainedConfig, processor: Any, spec: DataSpec) -> None:
        """Raise ModelError for a model without an encoder, DataError for a ``forced_bos_token`` that is none."""
        if not config.is_encoder_decoder:
            raise ModelError(f"A {config.model_type} model has no encoder and decoder; use causal-lm for it.")
        _forced(processor, spec)

    def row_length(self, spec: DataSpec) -> tuple[str, int]:
        """Return the longer of ``max_source_length`` and ``max_target_length``."""
        lengths = {"data.max_source_length": spec.max_source_length, "data.max_target_length": spec.max_target_length}
        return max(((name, length or 0) for name, length in lengths.items()), key=lambda pair: pair[1])

    def encode(self, rows: Dataset, processor: Any, spec: DataSpec, labels: list[str] | None) -> Dataset:
        """Tokenize sources and targets and cut both."""
        for text, lang in (("src_lang", spec.source_lang), ("tgt_lang", spec.target_lang)):
            if lang is not None and hasattr(processor, text):
                setattr(processor, text, lang)

        def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
            sources, targets = texts_of(batch, spec)
            prefixed = [f"{spec.source_prefix or ''}{source}" for source in sources]
            encoded = processor(prefixed, truncation=True, max_length=spec.max_source_length)
            wanted = processor(text_target=targets, truncation=True, max_length=spec.max_target_length)
            return {**encoded, "labels": wanted["input_ids"]}

        return mapped(rows, tokenize)

    def collator(self, processor: Any, spec: DataSpec, seed: int | None = None) -> Any:
        """Return the collator that pads sources, and targets by -100."""
        return DataCollatorForSeq2Seq(processor)

    def forms(self, head: Head | None) -> tuple[Form, ...]:
        """Return the forms in which ``reader`` reads answers."""
        return "texts", "classes", "likelihood"

    def reader(self, held_out: HeldOut) -> Reader:
        """Return a reader that generates where a metric wants texts."""
        return TextReader(held_out, texts_of(held_out.rows[:], held_out.spec)[1])


class TextReader(Reader):
    """Reads how likely the targets are and, where a metric wants it, what the model writes by itself."""

    def __init__(self, held_out: HeldOut, references: list[str]) -> None:
        super().__init__()
        self.held_out = held_out
        self.references = references
        self.seen = 0

    def forms(self, kind: Outputs) -> tuple[Form, ...]:
        """Return texts, and what classes can be read as."""
        return ("texts", *super().forms(kind))

    def read(self, model: nn.Module, batch: Mapping[str, Any], kind: Outputs, wanted: Set[Form]) -> Found:
        """Run the batch with the targets, and without them where texts are wanted."""
        found = super().read(model, batch, kind, wanted - {"texts"})
        count = len(batch["labels"])
        if "texts" in wanted:
            texts = self.generated(model, batch)
            found["texts"] = both(texts, self.references[self.seen : self.seen + count])
        self.seen += count
        return found

    def new_tokens(self, model: Any) -> int | None:
        """Return how many tokens a text may have."""
        return self.held_out.spec.max_target_length

    def generated(self, model: Any, batch: Mapping[str, Any]) -> list[str]:
        """Return what the model writes for each row, without special tokens."""
        inputs = {k: v for k, v in on_device(model, batch).items() if k not in ("labels", "decoder_input_ids")}
        tokens = model.generate(
            **inputs,
            max_new_tokens=self.new_tokens(model),
            num_beams=self.held_out.num_beams,
            do_sample=False,
            **_forced(self.held_out.processor, self.held_out.spec),
        )
        written = self.held_out.processor.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in written]


def _forced(processor: Any, spec: DataSpec) -> dict[str, int]:
    """Return what ``generate`` takes for ``forced_bos_token``.  Raises DataError for a token that is not there."""
    token = spec.forced_bos_token
    if token is None:
        return {}
    known = processor.get_vocab()
    if token not in known:
        raise DataError(f"data.forced_bos_token '{token}' is no token of the tokenizer. {did_you_mean(token, known)}")
    return {"forced_bos_token_id": known[token]}


def texts_of(batch: dict[str, list[Any]], spec: DataSpec) -> tuple[list[str], list[str]]:
    """Return sources and targets.  Raises DataError for a translation without one of the languages."""
    if not spec.source_lang:
        return batch[str(spec.text_column)], batch[str(spec.summary_column)]
    pairs = batch[TRANSLATION]
    for row, pair in enumerate(pairs):
        for lang in (spec.source_lang, spec.target_lang):
            if not isinstance(pair, dict) or pair.get(lang) is None:
                has = ", ".join(pair) if isinstance(pair, dict) else type(pair).__name__
                raise DataError(f"Row {row} of column '{TRANSLATION}' has no '{lang}', only {has}.")
    return [pair[spec.source_lang] for pair in pairs], [pair[spec.target_lang] for pair in pairs]
