"""Language modelling: text packed into rows of equal length, without padding."""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Dataset
from transformers import default_data_collator

from hfcompress.calibration.texts import pack
from hfcompress.errors import DataError
from hfcompress.recipe import DataSpec
from hfcompress.tasks.base import Task


class CausalLM(Task):
    """Predict each token from those before it."""

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    metrics = ("perplexity",)
    packs: ClassVar[bool] = True
    pads: ClassVar[bool] = False
    one_text: ClassVar[bool] = True
    predicts_tokens: ClassVar[bool] = True

    def columns(self, spec: DataSpec) -> list[str]:
        """Return the text column."""
        return [str(spec.text_column)]

    def encode(self, rows: Dataset, processor: Any, spec: DataSpec, labels: list[str] | None) -> Dataset:
        """Pack all documents, with the end token between them, into rows of ``block_size`` tokens."""
        option, length = self.row_length(spec)
        blocks = pack(rows[str(spec.text_column)], processor, length)
        refuse_none(blocks, option, length)
        return Dataset.from_dict({"input_ids": blocks, "labels": blocks})

    def row_length(self, spec: DataSpec) -> tuple[str, int]:
        """Return ``block_size``, which every row fills."""
        assert spec.block_size is not None
        return "data.block_size", spec.block_size

    def collator(self, processor: Any, spec: DataSpec, seed: int | None = None) -> Any:
        """Return transformers' default collator: all rows have the same length."""
        return default_data_collator

    def calibration_rows(self, rows: Dataset, processor: Any, spec: DataSpec, count: int, length: int) -> Dataset:
        """Pack the documents into rows of ``length`` tokens; the last, shorter rest is dropped."""
        return Dataset.from_dict({"input_ids": pack(rows[str(spec.text_column)], processor, length, count)})


def refuse_none(blocks: list[list[int]], option: str, length: int) -> None:
    """Raise DataError when a part of the text fills no row."""
    if not blocks:
        raise DataError(
            f"One part of the text has less than {length} tokens ({option}), so it fills no row. "
            f"Give more text or a smaller {option.removeprefix('data.')}."
        )
