"""A teacher with a tokenizer of its own, which reads the text of the student's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.distillation.losses.taps import Tap
from hfcompress.distillation.losses.targets import Elsewhere
from hfcompress.distillation.teachers.base import Answer
from hfcompress.distillation.teachers.live import LiveTeacher
from hfcompress.distillation.teachers.spans import NOWHERE, Spans, aligned
from hfcompress.errors import DataError
from hfcompress.outputs import Batch, Outputs
from hfcompress.structure.lengths import longest_input

_ROWS_REMEMBERED = 1024  # those of a step are read when they are counted and again when they are answered


class AcrossTokenizers(LiveTeacher):
    """Runs a causal language model on its own tokens of each row's text, and says which places can be compared.

    tokenizer: the student's.  teacher_tokenizer: a fast one.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, teacher_tokenizer: Any) -> None:
        super().__init__(model)
        self.classes = None  # they are not the student's
        self.student_spans, self.teacher_spans = Spans(tokenizer), Spans(teacher_tokenizer)
        self.special = set(tokenizer.all_special_ids)
        self.roles = {
            getattr(tokenizer, role): getattr(teacher_tokenizer, role) for role in ("bos_token_id", "eos_token_id")
        }
        self.first = _before_text(teacher_tokenizer)
        self.longest = longest_input(model.config)
        self.read = lru_cache(_ROWS_REMEMBERED)(self._read)

    @property
    def columns(self) -> set[str]:
        """Return the columns that hold the text."""
        return {"input_ids", "attention_mask"}

    @torch.no_grad()
    def answer(self, inputs: Mapping[str, Any], kind: Outputs, rows: Tensor | None, taps: Sequence[Tap]) -> Answer:
        """Read the text of each row; the answer's places are the teacher's own."""
        assert rows is not None
        own = self._batch([tokens for tokens, _ in self._rows(inputs)])
        logits: Tensor = self.model(**own).logits
        places = self._places(inputs, logits.shape[1]).reshape(-1)[rows.cpu()]
        return Answer(Elsewhere(logits.reshape(-1, logits.shape[-1]), places.to(logits.device)), None, None, {})

    def comparable(self, inputs: Batch, kind: Outputs) -> int:
        """Return at how many of the places that count both models have read the same."""
        counted = kind.compared(inputs).cpu().reshape(-1)
        return int((self._places(inputs, 1).reshape(-1)[counted] != NOWHERE).sum())

    def refuse_other_data(self, batches: Sequence[Batch], kind: Outputs) -> None:
        """Raise DataError where some batches have labels but no place that can be compared."""
        labelled = sum(int(kind.compared(batch).sum()) for batch in batches)
        if labelled and not any(self.comparable(batch, kind) for batch in batches):
            raise DataError(
                f"At none of the {labelled} labels of the first rows that were looked at has the teacher read the "
                "same text as the student, so nothing can be compared. Is processing_class the tokenizer that made "
                "these rows?"
            )

    def _rows(self, inputs: Batch) -> list[tuple[list[int], list[int]]]:
        ids, mask = _ids_and_mask(inputs)
        return [self.read(tuple(row[real].tolist())) for row, real in zip(ids, mask)]

    def _places(self, inputs: Batch, length: int) -> Tensor:
        """Return the place among a batch's logits, rows of ``length``, for each of the student's tokens."""
        ids, mask = _ids_and_mask(inputs)
        places = torch.full(ids.shape, NOWHERE)
        for row, (_, found) in enumerate(self._rows(inputs)):
            there = torch.tensor(found, dtype=torch.long)
            places[row, mask[row]] = torch.where(there == NOWHERE, there, there + row * length)
        return places

    def _read(self, ids: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """Return the teacher's tokens of a row, and its place for each of the student's tokens.

        A token that begins or ends a text becomes the teacher's own and counts as a character of the text.
        """
        tokens, ends = list(self.first), [NOWHERE] * len(self.first)
        own: list[int] = []
        read = 0
        if tokens:
            ends[-1] = 0  # both are to say how a text begins
        for special, group in groupby(ids, lambda one: one in self.special):
            part = list(group)
            if not special:
                text, found = self.student_spans.decode(part)
                more, theirs = self.teacher_spans.encode(text)
                own += _moved(found, read)
                tokens, ends, read = tokens + more, ends + _moved(theirs, read), read + len(text)
                continue
            for one in part:
                if not own and one in self.roles:
                    own.append(0)
                elif self.roles.get(one) is None:
                    own.append(NOWHERE)
                else:
                    read += 1
                    own.append(read)
                    tokens, ends = [*tokens, self.roles[one]], [*ends, read]
        return tokens[: self.longest], aligned(own, ends[: self.longest])

    def _batch(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """Return the rows padded on the right; an empty text is one padding token."""
        width = max(1, *(len(row) for row in rows))
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[index, : max(1, len(row))] = 1
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}


def _ids_and_mask(inputs: Batch) -> tuple[Tensor, Tensor]:
    ids: Tensor = inputs["input_ids"].cpu()
    mask = inputs.get("attention_mask")
    return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()


def _before_text(tokenizer: Any) -> list[int]:
    """Return the special tokens that a tokenizer puts before a text."""
    found = tokenizer("a", return_special_tokens_mask=True)
    count = found["special_tokens_mask"].index(0)
    return list(found["input_ids"][:count])


def _moved(ends: Sequence[int], by: int) -> list[int]:
    return [end if end == NOWHERE else end + by for end in ends]
