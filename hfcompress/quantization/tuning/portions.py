"""Calibration batches cut into portions of a few rows each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hfcompress.calibration.running import Batch

ONE_IN = 16  # rows is held back


def rows_of(batch: Batch) -> int:
    """Return how many rows a batch has."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim())


def held_back(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return the batches without one row in ``ONE_IN``, and those rows; batches that cannot be cut keep theirs."""
    rest: list[Batch] = []
    held: list[Batch] = []
    first = 0
    for batch in batches:
        rows = range(rows_of(batch))
        out = [row for row in rows if (first + row) % ONE_IN == ONE_IN - 1] if _has_rows_alone(batch) else []
        first += len(rows)
        kept = [row for row in rows if row not in out]
        rest += [_part(batch, kept) if out else batch] if kept else []
        held += [_part(batch, out)] if out else []
    return rest, held


def portions(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """Return batches of at most so many rows; one that cannot be cut stays whole."""
    found: list[Batch] = []
    for batch in batches:
        if _has_rows_alone(batch):
            found += [_part(batch, slice(start, start + rows)) for start in range(0, rows_of(batch), rows)]
        else:
            found.append(batch)
    return found


def _has_rows_alone(batch: Batch) -> bool:
    """Tell whether every tensor of a batch has a part for each row."""
    rows = rows_of(batch)
    return all(value.dim() and len(value) == rows for value in batch.values() if isinstance(value, Tensor))


def _part(batch: Batch, rows: slice | list[int]) -> dict[str, Any]:
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in batch.items()}
