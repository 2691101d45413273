"""One label, several labels or a number for a text or a pair of texts."""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel

from hfcompress.errors import DataError
from hfcompress.evaluate.metrics import Form
from hfcompress.recipe import DataSpec
from hfcompress.tasks.base import Head, Task, mapped
from hfcompress.tasks.labels import label_names, numbered, refuse_single

MULTI, REGRESSION = "multi_label_classification", "regression"


class SequenceClassification(Task):
    """Choose a class for a text, any number of classes, or a number.

    What it is follows from the label column: lists are several labels, numbers with fractions a regression.
    """

    name = "sequence-classification"
    auto_class = "AutoModelForSequenceClassification"
    metrics = ("accuracy", "f1")
    head_name: ClassVar[str | None] = "ForSequenceClassification"
    one_text: ClassVar[bool] = True

    def columns(self, spec: DataSpec) -> list[str]:
        """Return the text columns and the label column."""
        pair = [spec.text_pair_column] if spec.text_pair_column else []
        return [str(spec.text_column), *pair, str(spec.label_column)]

    def head(self, rows: Dataset, spec: DataSpec) -> Head:
        """Return the labels' names and what kind of problem they pose.  Raises DataError where that does not fit."""
        column = str(spec.label_column)
        value = rows[0][column]
        usual: str | None = MULTI if isinstance(value, list) else REGRESSION if isinstance(value, float) else None
        problem: str | None = spec.problem_type or usual
        if (problem == MULTI) != (usual == MULTI):
            raise DataError(
                f"data.problem_type is {problem}, but column '{column}' holds {type(value).__name__} {value!r}; "
                f"{MULTI} needs a list of labels in each row, and nothing else does."
            )
        if problem == REGRESSION:
            if not isinstance(value, (int, float)):
                raise DataError(f"A regression needs numbers in column '{column}', which holds {value!r}.")
            return Head(problem=REGRESSION)
        names = label_names(rows, column)
        if problem == MULTI:
            return Head(tuple(names), MULTI)
        refuse_single(names)
        return Head(tuple(names))

    def encode(self, rows: Dataset, processor: Any, spec: DataSpec, labels: list[str] | None) -> Dataset:
        """Tokenize, cut to ``max_length`` and number the labels.  Raises DataError for a label with no number."""
        column = str(spec.label_column)
        encoded = self.unlabelled(rows, processor, spec)
        if not labels:
            return encoded.add_column("labels", [float(value) for value in rows[column]])
        numbers = numbered(rows, column, labels)
        if numbers and isinstance(numbers[0], list):
            numbers = [[float(index in row) for index in range(len(labels))] for row in numbers]
        return encoded.add_column("labels", numbers)

    def unlabelled(self, rows: Dataset, processor: Any, spec: DataSpec) -> Dataset:
        """Tokenize and cut to ``max_length``."""

        def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
            pair = batch[spec.text_pair_column] if spec.text_pair_column else None
            return dict(processor(batch[str(spec.text_column)], pair, truncation=True, max_length=spec.max_length))

        return mapped(rows, tokenize)

    def prepare_(self, model: PreTrainedModel, processor: Any, head: Head | None) -> None:
        """Tell the model its problem, and which token pads: a decoder classifies by the last that is another."""
        config = model.config.get_text_config()
        if processor.pad_token_id is not None:
            config.pad_token_id = processor.pad_token_id
        if head is not None and head.problem is not None:
            model.config.problem_type = head.problem  # type: ignore[assignment]

    def collator(self, processor: Any, spec: DataSpec, seed: int | None = None) -> Any:
        """Return the collator that pads a batch to its longest row."""
        return DataCollatorWithPadding(processor)

    def metrics_for(self, head: Head | None) -> tuple[str, ...]:
        """Return the metrics of a regression, or of classes."""
        return ("pearson", "spearman", "mse") if head is not None and head.problem == REGRESSION else self.metrics

    def forms(self, head: Head | None) -> tuple[Form, ...]:
        """Return numbers for a regression, decisions for several labels, else classes."""
        problem = None if head is None else head.problem
        return (
            ("numbers",) if problem == REGRESSION else ("decisions" if problem == MULTI else "classes", "likelihood")
        )
