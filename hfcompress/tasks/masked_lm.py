"""Masked language modelling: hidden tokens are predicted from those on both sides."""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedConfig

from hfcompress.calibration.texts import pack
from hfcompress.errors import ModelError
from hfcompress.recipe import DataSpec
from hfcompress.tasks.base import Task, mapped
from hfcompress.tasks.causal_lm import refuse_none


class MaskedLM(Task):
    """Predict hidden tokens; which ones are hidden is drawn anew in training, and is the same in every measurement."""

    name = "masked-lm"
    auto_class = "AutoModelForMaskedLM"
    metrics = ("perplexity",)
    packs: ClassVar[bool] = True
    one_text: ClassVar[bool] = True
    draws_anew: ClassVar[bool] = True
    predicts_tokens: ClassVar[bool] = True

    def columns(self, spec: DataSpec) -> list[str]:
        """Return the text column."""
        return [str(spec.text_column)]

    def check(self, config: PreTrainedConfig, processor: Any, spec: DataSpec) -> None:
        """Raise ModelError for a tokenizer without a token that hides another."""
        if processor.mask_token is None:
            raise ModelError(
                "masked-lm needs a tokenizer with a mask token, which this one has not. Use causal-lm for it."
            )

    def encode(self, rows: Dataset, processor: Any, spec: DataSpec, labels: list[str] | None) -> Dataset:
        """Pack the texts into rows of ``max_length`` tokens, or with ``line_by_line`` cut each text to that."""
        texts, length = rows[str(spec.text_column)], spec.max_length
        assert length is not None
        if spec.line_by_line:
            return mapped(
                rows, lambda batch: dict(processor(batch[str(spec.text_column)], truncation=True, max_length=length))
            )
        blocks = pack(texts, processor, length, special=True)
        refuse_none(blocks, "data.max_length", length)
        return Dataset.from_dict({"input_ids": blocks, "attention_mask": [[1] * length for _ in blocks]})

    def calibration_rows(self, rows: Dataset, processor: Any, spec: DataSpec, count: int, length: int) -> Any:
        """Return the first ``count`` rows, of ``length`` tokens at most."""
        encoded = super().calibration_rows(rows, processor, spec, len(rows), length)
        return encoded.select(range(min(count, len(encoded))))

    def collator(self, processor: Any, spec: DataSpec, seed: int | None = None) -> Any:
        """Return transformers' collator, which hides ``mlm_probability`` of the tokens."""
        return DataCollatorForLanguageModeling(processor, mlm_probability=spec.mlm_probability, seed=seed)
