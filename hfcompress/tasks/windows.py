"""Contexts cut into windows that a model can read, each with its question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfcompress.errors import DataError
from hfcompress.recipe import DataSpec

_NOT_INPUTS = ("offset_mapping", "overflow_to_sample_mapping")


@dataclass(frozen=True)
class Window:
    """One question with a part of its context.

    row: whose window it is.  inputs: what the model takes.  offsets: the characters of the context that each token
    stands for, None for tokens outside the context.  first: the token that means "no answer here".
    """

    row: int
    inputs: dict[str, list[int]]
    offsets: list[tuple[int, int] | None]
    first: int

    def span_of(self, answer: dict[str, list[Any]]) -> tuple[int, int]:
        """Return the first and the last token of a row's first answer; ``first`` twice where it is not inside."""
        if not answer["text"]:
            return self.first, self.first
        start = answer["answer_start"][0]
        end = start + len(answer["text"][0])
        inside = [
            place for place, span in enumerate(self.offsets) if span is not None and span[0] < end and span[1] > start
        ]
        known = [span for span in self.offsets if span is not None]
        whole = bool(inside) and known[0][0] <= start and known[-1][1] >= end
        return (inside[0], inside[-1]) if whole else (self.first, self.first)


def cut_into_windows(batch: dict[str, list[Any]], processor: Any, spec: DataSpec) -> list[Window]:
    """Tokenize questions with their contexts, in overlapping windows of ``max_length`` tokens at most.

    Raises DataError for a question that leaves no room for its context.
    """
    questions = [str(text).lstrip() for text in batch[str(spec.question_column)]]
    contexts = batch[str(spec.context_column)]
    # Tokenizers that pad on the left take the context first, as Transformers' example does.
    right = processor.padding_side == "right"
    try:
        encoded = processor(
            *((questions, contexts) if right else (contexts, questions)),
            truncation="only_second" if right else "only_first",
            max_length=spec.max_length,
            stride=spec.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
    except BaseException as error:  # the tokenizers library panics where a question fills the whole window
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise DataError(
            f"A question leaves no room for its context in windows of {spec.max_length} tokens that share "
            f"{spec.doc_stride}. Use a larger data.max_length or a smaller data.doc_stride. ({error})"
        ) from error
    return [
        _window(encoded, index, 1 if right else 0, processor.cls_token_id)
        for index in range(len(encoded["input_ids"]))
    ]


def _window(encoded: Any, index: int, context: int, cls_token_id: int | None) -> Window:
    belongs = encoded.sequence_ids(index)
    inputs = {name: encoded[name][index] for name in encoded if name not in _NOT_INPUTS}
    ids = inputs["input_ids"]
    return Window(
        encoded["overflow_to_sample_mapping"][index],
        inputs,
        [tuple(span) if part == context else None for span, part in zip(encoded["offset_mapping"][index], belongs)],
        ids.index(cls_token_id) if cls_token_id in ids else 0,
    )


@dataclass(frozen=True)
class WindowCollator:
    """Pads windows on the right, whatever the tokenizer's side: answers are places counted from the left."""

    processor: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return one batch."""
        return dict(self.processor.pad(rows, padding_side="right", return_tensors="pt"))
