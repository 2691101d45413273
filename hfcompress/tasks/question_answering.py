"""Extractive question answering: where in a context the answer to a question stands."""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedConfig

from hfcompress.errors import DataError
from hfcompress.evaluate import Reader
from hfcompress.evaluate.metrics import Form
from hfcompress.recipe import DataSpec
from hfcompress.tasks.answers import AnswerReader
from hfcompress.tasks.base import Head, HeldOut, Task, mapped, refuse_slow_tokenizer
from hfcompress.tasks.windows import WindowCollator, cut_into_windows


class QuestionAnswering(Task):
    """Find the answer in the context; one longer than ``max_length`` is cut into windows that overlap."""

    name = "question-answering"
    auto_class = "AutoModelForQuestionAnswering"
    metrics = ("exact_match", "answer_f1")
    head_name: ClassVar[str | None] = "ForQuestionAnswering"

    def columns(self, spec: DataSpec) -> list[str]:
        """Return the columns of questions, contexts and answers."""
        return [str(spec.question_column), str(spec.context_column), str(spec.answer_column)]

    def check(self, config: PreTrainedConfig, processor: Any, spec: DataSpec) -> None:
        """Raise ModelError for a slow tokenizer, DataError for windows that do not advance."""
        refuse_slow_tokenizer(processor, self.name)
        assert spec.doc_stride is not None
        assert spec.max_length is not None
        if spec.doc_stride >= spec.max_length:
            raise DataError(
                f"data.doc_stride is {spec.doc_stride} tokens, which windows of data.max_length={spec.max_length} "
                "cannot share. Make it smaller."
            )

    def encode(self, rows: Dataset, processor: Any, spec: DataSpec, labels: list[str] | None) -> Dataset:
        """Make windows, each with the answer's first and last token, or the first token where it is not in it."""
        _refuse_answers(rows, spec)

        def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            windows = cut_into_windows(batch, processor, spec)
            answers = batch[str(spec.answer_column)]
            spans = [window.span_of(answers[window.row]) for window in windows]
            encoded = {name: [window.inputs[name] for window in windows] for name in windows[0].inputs}
            starts, ends = ([span[side] for span in spans] for side in (0, 1))
            return {**encoded, "start_positions": starts, "end_positions": ends}

        return mapped(rows, tokenize)

    def collator(self, processor: Any, spec: DataSpec, seed: int | None = None) -> Any:
        """Return the collator that pads a batch to its longest window."""
        return WindowCollator(processor)

    def forms(self, head: Head | None) -> tuple[Form, ...]:
        """Return the forms in which ``reader`` reads answers."""
        return ("answers",)

    def reader(self, held_out: HeldOut) -> Reader:
        """Return a reader that finds the best span over all windows of a question."""
        return AnswerReader(held_out)


def _refuse_answers(rows: Dataset, spec: DataSpec) -> None:
    """Raise DataError for answers in another form than SQuAD's, or that do not stand where they say."""
    column, context = str(spec.answer_column), str(spec.context_column)
    for index, (answer, text) in enumerate(zip(rows[column], rows[context])):
        if not isinstance(answer, dict) or not {"text", "answer_start"} <= set(answer):
            raise DataError(
                f"Column '{column}' must hold mappings with the lists 'text' and 'answer_start', as SQuAD does; "
                f"row {index} holds {type(answer).__name__}."
            )
        if not answer["text"] and not spec.version_2_with_negative:
            raise DataError(
                f"Row {index} has no answer in column '{column}'. Set data.version_2_with_negative: true if some "
                "questions have none."
            )
        for words, start in zip(answer["text"], answer["answer_start"]):
            if text[start : start + len(words)] != words:
                raise DataError(
                    f"Row {index}: answer {words!r} does not stand at character {start} of column '{context}', where "
                    f"{text[start : start + len(words)]!r} does."
                )
