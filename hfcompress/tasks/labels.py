"""Class labels: their names in the data, and their numbers in the order of a model's head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from datasets import ClassLabel, Dataset

from hfcompress.errors import DataError


def class_label(rows: Dataset, column: str) -> ClassLabel | None:
    """Return the column's class labels, also where each row holds a list of them."""
    feature = rows.features[column]
    while not isinstance(feature, ClassLabel) and hasattr(feature, "feature"):
        feature = feature.feature
    return feature if isinstance(feature, ClassLabel) else None


def label_names(rows: Dataset, column: str) -> list[str]:
    """Return the names of the labels in the order of their numbers; a row holds one label or a list of them."""
    named = class_label(rows, column)
    if named is not None:
        return list(named.names)
    values = sorted(set(_flat(rows[column])), key=lambda value: (isinstance(value, str), value))
    if any(isinstance(value, float) for value in values):
        raise DataError(f"Column '{column}' holds numbers with fractions; classification needs classes.")
    if values and isinstance(values[0], int) and values != list(range(len(values))):
        raise DataError(f"Labels in column '{column}' must be 0 to {len(values) - 1} without a gap, not {values[:9]}.")
    return [str(value) for value in values]


def numbered(rows: Dataset, column: str, labels: list[str]) -> list[Any]:
    """Return each row's label, or list of labels, as numbers in the order of ``labels``.

    Raises DataError, naming the label, for one that is not among them.
    """
    named = class_label(rows, column)
    number = {name: index for index, name in enumerate(labels)}

    def number_of(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [number_of(one) for one in value]
        name = named.int2str(value) if named is not None and isinstance(value, int) else str(value)
        if name not in number:
            raise DataError(
                f"Label {name!r} in column '{column}' is not one of the model's labels: {', '.join(labels)}."
            )
        return number[name]

    return [number_of(value) for value in rows[column]]


def refuse_single(names: Mapping[Any, Any] | Iterable[str]) -> None:
    """Raise DataError when there is only one class."""
    found = list(names)
    if len(found) < 2:
        raise DataError(f"The training data have only one label, {found}; there is nothing to classify.")


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value
