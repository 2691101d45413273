"""Which of several endings goes on with a text."""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Dataset
from transformers import DataCollatorForMultipleChoice

from hfcompress.errors import DataError
from hfcompress.recipe import DataSpec
from hfcompress.tasks.base import Task, mapped


class MultipleChoice(Task):
    """Choose an ending: of ``context_column``, followed by ``question_column`` and each ending in turn."""

    name = "multiple-choice"
    auto_class = "AutoModelForMultipleChoice"
    metrics = ("accuracy",)
    head_name: ClassVar[str | None] = "ForMultipleChoice"

    def columns(self, spec: DataSpec) -> list[str]:
        """Return the columns of contexts, questions, endings and labels."""
        assert spec.ending_columns is not None
        return [str(spec.context_column), str(spec.question_column), *spec.ending_columns, str(spec.label_column)]

    def encode(self, rows: Dataset, processor: Any, spec: DataSpec, labels: list[str] | None) -> Dataset:
        """Tokenize every row once for each of its endings, the context cut where both do not fit."""
        assert spec.ending_columns is not None
        several = [_endings(row, spec.ending_columns) for row in rows.select_columns(list(spec.ending_columns))]
        count = len(several[0])
        for index, endings in enumerate(several):
            if len(endings) != count:
                raise DataError(f"Row {index} has {len(endings)} endings and row 0 has {count}; all need as many.")
        answers = [_answer(value, count, index) for index, value in enumerate(rows[str(spec.label_column)])]

        def tokenize(batch: dict[str, list[Any]], places: list[int]) -> dict[str, list[Any]]:
            contexts = [text for text in batch[str(spec.context_column)] for _ in range(count)]
            questions = [text for text in batch[str(spec.question_column)] for _ in range(count)]
            endings = [ending for place in places for ending in several[place]]
            seconds = [f"{question} {ending}".strip() for question, ending in zip(questions, endings)]
            flat = processor(contexts, seconds, truncation=True, max_length=spec.max_length)
            grouped = {name: [v[i : i + count] for i in range(0, len(v), count)] for name, v in flat.items()}
            return {**grouped, "labels": [answers[place] for place in places]}

        numbered = rows.add_column("hfcompress_row", list(range(len(rows))))
        return mapped(numbered, lambda batch: tokenize(batch, batch["hfcompress_row"]))

    def collator(self, processor: Any, spec: DataSpec, seed: int | None = None) -> Any:
        """Return the collator that pads all endings of a batch to the longest."""
        return DataCollatorForMultipleChoice(processor)


def _endings(row: dict[str, Any], columns: tuple[str, ...]) -> list[str]:
    """Return a row's endings: one column each, or a column that holds a list."""
    values = [row[column] for column in columns]
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if len(values) < 2 or not all(isinstance(value, str) for value in values):
        raise DataError(
            f"data.ending_columns must name two or more columns of text, or one with lists of texts, not "
            f"{', '.join(columns)} with {values!r}."
        )
    return values


def _answer(value: Any, count: int, index: int) -> int:
    """Return which ending is right, from a number counted from 0 or a letter counted from A."""
    number = value
    if isinstance(value, str):
        number = int(value) if value.isdecimal() else ord(value) - ord("A") if len(value) == 1 else -1
    if not isinstance(number, int) or not 0 <= number < count:
        raise DataError(f"Row {index}: label {value!r} is not one of its {count} endings, 0 to {count - 1}.")
    return number
