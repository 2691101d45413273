"""What many batches have, side by side in memory, so that it leaves no holes when it goes."""

from __future__ import annotations

from torch import Tensor


class Blocks:
    """Copies of rows by name, those of one name in one block: so many batches of as many rows as the first has."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.left: dict[str, Tensor] = {}

    def copy(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows, (tokens, size), as they lie in the block; where they do not fit, a new one begins."""
        left = self.left.get(name)
        if left is None or len(left) < len(rows) or (left.dtype, left.shape[1:]) != (rows.dtype, rows.shape[1:]):
            left = rows.new_empty(self.batches * len(rows), *rows.shape[1:])
        self.left[name] = left[len(rows) :]
        return left[: len(rows)].copy_(rows)
