"""One label for a text or a pair of texts."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel

from hfcompress.errors import DataError
from hfcompress.progress import quiet_bars
from hfcompress.recipe import DataSpec
from hfcompress.tasks.base import Task


class SequenceClassification(Task):
    """Choose one class for a text."""

    name = "sequence-classification"
    auto_class = "AutoModelForSequenceClassification"
    metrics = ("accuracy", "f1")

    def columns(self, spec: DataSpec) -> list[str]:
        """Return the text columns and the label column."""
        pair = [spec.text_pair_column] if spec.text_pair_column else []
        return [spec.text_column, *pair, spec.label_column]

    def encode(self, rows: Dataset, processor: Any, spec: DataSpec, labels: list[str] | None) -> Dataset:
        """Tokenize, cut to ``max_length`` and number the labels.  Raises DataError for a label with no number."""
        assert labels is not None
        number = {name: index for index, name in enumerate(labels)}
        column = rows.features[spec.label_column]
        names = [column.int2str(v) if hasattr(column, "int2str") else str(v) for v in rows[spec.label_column]]
        unknown = sorted(set(names) - set(number))
        if unknown:
            raise DataError(
                f"Label {unknown[0]!r} in column '{spec.label_column}' is not one of the model's labels: "
                f"{', '.join(labels)}."
            )
        encoded = self._tokenize(rows, processor, spec, spec.max_length)
        return encoded.add_column("labels", [number[name] for name in names])

    def row_length(self, spec: DataSpec) -> tuple[str, int]:
        """Return ``max_length``, where longer rows are cut."""
        return "data.max_length", spec.max_length

    def prepare_(self, model: PreTrainedModel, processor: Any) -> None:
        """Tell the model which token pads its batches: a decoder classifies by the last token that is another."""
        config = model.config.get_text_config()
        if processor.pad_token_id is not None:
            config.pad_token_id = processor.pad_token_id

    def _tokenize(self, rows: Dataset, processor: Any, spec: DataSpec, length: int) -> Dataset:
        def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
            pair = batch[spec.text_pair_column] if spec.text_pair_column else None
            return dict(processor(batch[spec.text_column], pair, truncation=True, max_length=length))

        with quiet_bars(len(rows) < 10_000):
            return rows.map(tokenize, batched=True, remove_columns=rows.column_names, keep_in_memory=True)

    def collator(self, processor: Any) -> Any:
        """Return the collator that pads a batch to its longest row."""
        return DataCollatorWithPadding(processor)

    def calibration_rows(self, rows: Dataset, processor: Any, spec: DataSpec, count: int, length: int) -> Dataset:
        """Tokenize the first ``count`` rows; the attention mask keeps padding out of the statistics."""
        first = rows.select(range(min(count, len(rows))))
        return self._tokenize(first, processor, spec, min(length, spec.max_length))
