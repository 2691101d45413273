"""What many batches have, side by side in memory, so that it leaves no holes when it goes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Blocks:
    """Copies of rows by name, one for each batch in their order, those of one name in one block where they fit.

    tokens: of each batch.  As many rows are expected of those that come as the first one has for its tokens.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self.done: dict[str, int] = {}
        self.left: dict[str, Tensor] = {}

    def copy(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows, (rows, size), as they lie in the block; where they do not fit, a new one begins."""
        batch = self.done.get(name, 0)
        self.done[name] = batch + 1
        left = self.left.get(name)
        if left is None or len(left) < len(rows) or (left.dtype, left.shape[1:]) != (rows.dtype, rows.shape[1:]):
            here, after = max(1, self.tokens[batch]), sum(self.tokens[batch + 1 :])
            left = rows.new_empty(len(rows) + -(-after * len(rows) // here), *rows.shape[1:])
        self.left[name] = left[len(rows) :]
        return left[: len(rows)].copy_(rows)
