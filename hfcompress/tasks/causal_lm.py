"""Language modelling: text packed into rows of equal length, without padding."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, default_data_collator

from hfcompress.calibration.texts import pack
from hfcompress.errors import DataError
from hfcompress.recipe import DataSpec
from hfcompress.tasks.base import Task

DEFAULT_BLOCK_SIZE = 256


class CausalLM(Task):
    """Predict each token from those before it."""

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    metrics = ("perplexity",)

    def columns(self, spec: DataSpec) -> list[str]:
        """Return the text column."""
        return [spec.text_column]

    def encode(self, rows: Dataset, processor: Any, spec: DataSpec, labels: list[str] | None) -> Dataset:
        """Pack all documents, with the end token between them, into rows of ``block_size`` tokens."""
        _, length = self.row_length(spec)
        blocks = pack(rows[spec.text_column], processor, length)
        if not blocks:
            raise DataError(
                f"One part of the text has less than {length} tokens (data.block_size), so it fills no row. "
                "Give more text or a smaller block_size."
            )
        return Dataset.from_dict({"input_ids": blocks, "labels": blocks})

    def row_length(self, spec: DataSpec) -> tuple[str, int]:
        """Return ``block_size``, which every row fills."""
        return "data.block_size", spec.block_size or DEFAULT_BLOCK_SIZE

    def prepare_(self, model: PreTrainedModel, processor: Any) -> None:
        """Change nothing: rows have no padding."""

    def collator(self, processor: Any) -> Any:
        """Return transformers' default collator: all rows have the same length."""
        return default_data_collator

    def calibration_rows(self, rows: Dataset, processor: Any, spec: DataSpec, count: int, length: int) -> Dataset:
        """Pack the documents into rows of ``length`` tokens; the last, shorter rest is dropped."""
        return Dataset.from_dict({"input_ids": pack(rows[spec.text_column], processor, length, count)})
