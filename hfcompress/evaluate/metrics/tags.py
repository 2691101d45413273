"""Metrics of tagged tokens: whole entities, as named-entity recognition counts them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from hfcompress.evaluate.metrics.base import Form, LocalMetric

Entity = tuple[str, int, int]


class EntityF1(LocalMetric):
    """F1 over entities (micro): one counts when its type, its first and its last token are all right.

    Tags are ``O``, or a type with B-, I-, E-, S- or L-, U- before it (IOB1, IOB2, IOBES, BILOU). An entity begins at
    B-, S-, U-, at a change of type, and after the end of another, as in CoNLL's own script.
    """

    takes: ClassVar[tuple[Form, ...]] = ("tags",)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        found, wanted = set(_numbered(predictions)), set(_numbered(references))
        total = len(found) + len(wanted)
        # Nothing found where there is nothing to find is right.
        return {"entity_f1": 2 * len(found & wanted) / total if total else 1.0}


def _numbered(rows: Iterable[Sequence[str]]) -> Iterator[tuple[int, Entity]]:
    for index, row in enumerate(rows):
        for entity in entities(row):
            yield index, entity


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """Yield the entities of one row as (type, first token, last token)."""
    kind, first = "", 0
    ended = True
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-") if tag != "O" else ("O", "", "")
        if prefix not in ("O", *"BIESLU"):  # a tag without a prefix is a type of its own
            prefix, name = "I", tag
        name = name or ("" if prefix == "O" else tag)
        begins = prefix in "BSU" or name != kind or ended
        if kind and begins:
            yield kind, first, place - 1
        if name and begins:
            first = place
        kind, ended = name, prefix in "ESLU"
