"""Teachers whose tokenizer is not the student's: when they are asked for, and what cannot be asked of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfcompress.distillation.losses import LogitLoss, Loss
from hfcompress.distillation.teachers import AcrossTokenizers, LiveTeacher, Teacher
from hfcompress.errors import ModelError
from hfcompress.outputs import NextTokens, outputs_of


def crossing_loss(losses: Mapping[str, Loss]) -> str | None:
    """Return the name of a loss that compares models of different tokenizers, None where there is none.

    Raises ModelError for one that does not, beside it.
    """
    across = [name for name, loss in losses.items() if isinstance(loss, LogitLoss) and loss.across_tokenizers]
    others = [name for name in losses if name not in across]
    if across and others:
        raise ModelError(
            f"{others[0]} compares the same tokens of both models, so it cannot stand beside {across[0]}, for which "
            "the teacher reads tokens of its own. Leave one of them out."
        )
    return across[0] if across else None


def reading_texts(
    name: str, teachers: Sequence[tuple[Teacher, float]], tokenizer: Any, teacher_tokenizers: Any
) -> list[tuple[Teacher, float]]:
    """Return the teachers, each reading texts in its own tokens, with their shares.

    name: of the loss that needs it.  teacher_tokenizers: one for all, or one for each.
    Raises ModelError for anything but models that predict the next token, and for tokenizers that cannot be used.
    """
    several = isinstance(teacher_tokenizers, (list, tuple))
    each = list(teacher_tokenizers) if several else [teacher_tokenizers] * len(teachers)
    if len(each) != len(teachers):
        raise ModelError(
            f"There are {len(teachers)} teachers, but {len(each)} tokenizers in teacher_processing_class."
        )
    return [(_reader(name, teacher, tokenizer, own), share) for (teacher, share), own in zip(teachers, each)]


def refuse_tokenizers(name: str, tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Raise ModelError unless a text can be followed through both tokenizers."""
    for argument, one in (("processing_class", tokenizer), ("teacher_processing_class", teacher_tokenizer)):
        if not hasattr(one, "get_vocab"):
            what = "is missing" if one is None else f"is a {type(one).__name__}"
            raise ModelError(
                f"{name} compares two tokenizations of one text: give the student's tokenizer as processing_class and "
                f"the teacher's as teacher_processing_class. {argument} {what}."
            )
    if not getattr(teacher_tokenizer, "is_fast", False):
        raise ModelError(
            f"{name} needs to know where in the text the teacher's tokens stand, which a "
            f"{type(teacher_tokenizer).__name__} does not say. Use a fast tokenizer of the 'tokenizers' package."
        )


def _reader(name: str, teacher: Teacher, tokenizer: Any, teacher_tokenizer: Any) -> Teacher:
    if not isinstance(teacher, LiveTeacher):
        raise ModelError(
            f"{name} asks the teacher about a text, but answers on disk are to the student's tokens. Give the teacher "
            "as a model."
        )
    if not isinstance(outputs_of(teacher.model), NextTokens):
        raise ModelError(
            f"{name} compares what two causal language models expect next; a {type(teacher.model).__name__} gives "
            f"{outputs_of(teacher.model).what}. Open it with AutoModelForCausalLM."
        )
    refuse_tokenizers(name, tokenizer, teacher_tokenizer)
    return AcrossTokenizers(teacher.model, tokenizer, teacher_tokenizer)
