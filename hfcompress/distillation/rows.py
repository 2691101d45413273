"""What is refused of the training rows before the first step."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hfcompress.distillation.checks import WeightedTeachers
from hfcompress.distillation.on_policy import OnPolicy, refuse_prompts
from hfcompress.distillation.teachers import AcrossTokenizers, CachedTeacher
from hfcompress.outputs import Batch, Outputs


def refuse_rows(
    rows: Any, collator: Any, student: PreTrainedModel, kind: Outputs, teachers: WeightedTeachers, on_policy: Any
) -> None:
    """Raise DataError or ModelError for rows that a teacher has no answer to, or the student cannot complete.

    rows: a sequence of encoded examples.  collator: makes a batch of them.  kind: of the outputs.
    """
    for teacher, _ in teachers:
        if isinstance(teacher, CachedTeacher):
            teacher.refuse_other_rows(rows, collator)
        if isinstance(teacher, AcrossTokenizers):
            teacher.refuse_other_data(_few(rows, collator), kind)
    if isinstance(on_policy, OnPolicy) and on_policy.fraction:
        for batch in _few(rows, collator):
            refuse_prompts(student, batch, on_policy)


def _few(rows: Any, collator: Any) -> list[Batch]:
    """Return the first, the middle and the last row, each as a batch."""
    last = len(rows) - 1
    return [collator([rows[row]]) for row in sorted({0, last // 2, last})]
