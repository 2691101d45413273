"""Which layer of the teacher each layer of the student learns from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hfcompress.errors import ModelError

_Index = Annotated[int, Field(ge=0)]
Layers = Literal["auto", "last"] | tuple[tuple[_Index, _Index], ...]


def spread(student: int, teacher: int) -> list[int]:
    """Return ``student`` evenly spaced layers of a teacher's, the last one last: 1, 3, 5 for three of six."""
    return [round((layer + 1) * teacher / student) - 1 for layer in range(student)]


def layer_pairs(layers: Layers, student: int, teacher: int) -> list[tuple[int, int]]:
    """Return pairs of a student's layer and the teacher's layer that it learns from.

    student, teacher: numbers of layers.  Raises ModelError for a layer that is not there.
    """
    if layers == "last":
        return [(student - 1, teacher - 1)]
    if layers == "auto":
        if student > teacher:
            raise ModelError(
                f"layers: auto spreads the student's {student} layers over the teacher's, which has only {teacher}. "
                "Give pairs of layers."
            )
        return list(enumerate(spread(student, teacher)))
    assert isinstance(layers, tuple)
    for own, other in layers:
        if own >= student or other >= teacher:
            raise ModelError(
                f"layers: [{own}, {other}] names a layer that is not there: the student has layers 0 to "
                f"{student - 1}, the teacher 0 to {teacher - 1}."
            )
    if not layers:
        raise ModelError("layers: names no pair of layers; leave it out for evenly spaced ones.")
    return list(layers)
