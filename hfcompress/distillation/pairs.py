"""What a student and a teacher must share before their outputs can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfcompress.errors import ModelError
from hfcompress.outputs.base import Values


def refuse_other_size(student: int, teacher: int, values: Values = "odds") -> None:
    """Raise ModelError unless both have the same number of logits.  values: what the outputs are."""
    if student == teacher:
        return
    if values != "odds":
        what = "labels" if values == "numbers" else "size (hidden_size)"
        raise ModelError(
            f"The student gives {student} numbers for a row and the teacher {teacher}, so they cannot be compared one "
            f"by one. Use a teacher of the same {what}."
        )
    raise ModelError(
        f"The student has {student} classes or tokens and the teacher {teacher}, so their logits cannot be "
        "compared. Use a teacher with the same labels or the same tokenizer and vocabulary size."
    )


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor, None for one of images."""
    found = getattr(processor, "tokenizer", processor)
    return found if hasattr(found, "get_vocab") else None


def shared_vocabulary(student: int, teacher: int, tokenizer: Any, teacher_tokenizer: Any) -> int:
    """Return how many logits two language models share: all, or those of the tokenizer that both have.

    student, teacher: numbers of logits; models of one family pad their vocabularies to different sizes.
    Raises ModelError for sizes that differ where the tokenizers do, or are not both known.
    """
    if tokenizer is not None and teacher_tokenizer is not None:
        refuse_other_vocabulary(tokenizer.get_vocab(), teacher_tokenizer.get_vocab())
    elif student != teacher:
        raise ModelError(
            f"The student has {student} classes or tokens and the teacher {teacher}, so their logits cannot be "
            "compared, unless both have the same tokenizer: give processing_class and teacher_processing_class to "
            "show that they have. Across tokenizers, language models have losses=['universal_logit']."
        )
    if student != teacher and len(tokenizer) > min(student, teacher):
        raise ModelError(
            f"The tokenizer has {len(tokenizer)} tokens, but one of the models knows only {min(student, teacher)}."
        )
    return min(student, teacher)


def refuse_other_preparation(teacher: str, own: Any, other: Any) -> None:
    """Raise ModelError where a teacher was trained on images or sounds that were prepared otherwise.

    own, other: the student's and the teacher's processors.
    """
    mine, its = _preparation(own), _preparation(other)
    for name in mine.keys() & its.keys():
        if mine[name] != its[name]:
            raise ModelError(
                f"Teacher '{teacher}' reads inputs with {name}={its[name]}, but the student's are made with "
                f"{mine[name]}, so it would see what it was not trained on. Give the model the teacher's processor, "
                "or name another teacher."
            )


def _preparation(processor: Any) -> dict[str, Any]:
    """Return what decides the numbers that a processor makes of images or sounds; nothing for a tokenizer."""
    part = getattr(processor, "image_processor", None) or getattr(processor, "feature_extractor", None) or processor
    told: dict[str, Any] = part.to_dict() if hasattr(part, "model_input_names") and hasattr(part, "to_dict") else {}
    switched_off = {name for switch, names in _SWITCHED.items() if told.get(switch) is False for name in names}
    return {name: told[name] for name in _DECIDING if told.get(name) is not None and name not in switched_off}


# Of image processors and of feature extractors.
_SWITCHED = {
    "do_resize": ("size",),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
}
_DECIDING = (
    "do_resize", "size", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std", "sampling_rate", "feature_size", "n_fft", "hop_length",
)  # fmt: skip


def refuse_other_labels(student: Sequence[str], teacher: Sequence[str]) -> None:
    """Raise ModelError, naming the first class that differs, unless both name the same classes in the same order.

    Numbers, and the ``LABEL_0`` that Transformers gives to classes without names, stand for any name.
    """
    if _unnamed(student) or _unnamed(teacher):
        return
    for index, (one, other) in enumerate(zip(student, teacher)):
        if one != other:
            raise ModelError(
                f"Class {index} is '{one}' for the student and '{other}' for the teacher, so their logits cannot be "
                "compared. Use a teacher with the same labels in the same order."
            )


def _unnamed(labels: Sequence[str]) -> bool:
    numbers = [str(index) for index in range(len(labels))]
    return list(labels) in (numbers, [f"LABEL_{number}" for number in numbers])


def refuse_other_vocabulary(student: Mapping[str, int], teacher: Mapping[str, int]) -> None:
    """Raise ModelError, naming the first token that differs, unless both vocabularies number the same tokens alike.

    student, teacher: token to id, as a tokenizer's ``get_vocab`` gives it.
    """
    if student == teacher:
        return
    one, other = ({index: token for token, index in vocabulary.items()} for vocabulary in (student, teacher))
    first = min(index for index in {*one, *other} if one.get(index) != other.get(index))
    said = [repr(tokens[first]) if first in tokens else "not there" for tokens in (one, other)]
    raise ModelError(
        f"Token {first} is {said[0]} for the student and {said[1]} for the teacher, so their logits cannot be "
        "compared. Use a teacher with the same tokenizer, or, of language models, losses=['universal_logit']."
    )
