"""Numbers for each row: regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from hfcompress.outputs.base import Batch, Outputs, Values, every_row, logits_in


class Numbers(Outputs):
    """One or more numbers for each row; the model's own loss is the mean squared error over rows and numbers."""

    what: ClassVar[str] = "numbers (regression)"
    values: ClassVar[Values] = "numbers"

    def labels(self, batch: Batch) -> Tensor:
        """Return (rows, numbers)."""
        labels = batch["labels"]
        return labels.reshape(len(labels), -1)

    def labelled(self, batch: Batch) -> Tensor:
        """Mark every row: a number has no sign for "not labelled"."""
        return every_row(batch)

    def logits(self, output: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return (rows, numbers)."""
        numbers = logits_in(output)
        return numbers.reshape(len(numbers), -1)
