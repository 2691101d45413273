"""What a task knows: its Auto class, its columns, its batches and its metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.recipe import DataSpec


class Task(ABC):
    """A kind of model; one subclass in one file each."""

    name: ClassVar[str]
    auto_class: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]

    @abstractmethod
    def columns(self, spec: DataSpec) -> list[str]:
        """Return the columns that the data must have."""

    @abstractmethod
    def encode(self, rows: Dataset, processor: Any, spec: DataSpec, labels: list[str] | None) -> Dataset:
        """Return rows of token ids and labels, as the model takes them.  labels: class names in order, if any."""

    @abstractmethod
    def collator(self, processor: Any) -> Any:
        """Return the function that makes a batch of encoded rows."""

    @abstractmethod
    def row_length(self, spec: DataSpec) -> tuple[str, int]:
        """Return the option that sets how many tokens a row may have, and its value."""

    @abstractmethod
    def prepare_(self, model: PreTrainedModel, processor: Any) -> None:
        """Fit a model that was just opened to how this task's batches are made."""

    @abstractmethod
    def calibration_rows(self, rows: Dataset, processor: Any, spec: DataSpec, count: int, length: int) -> Dataset:
        """Return at most ``count`` encoded rows of at most ``length`` tokens, without labels."""


def batches(rows: Dataset, collator: Any, batch_size: int) -> list[dict[str, Tensor]]:
    """Return the encoded rows as batches of tensors, in order."""
    return [
        dict(collator([rows[index] for index in range(first, min(first + batch_size, len(rows)))]))
        for first in range(0, len(rows), batch_size)
    ]
