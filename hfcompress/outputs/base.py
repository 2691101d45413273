"""What a kind of model's outputs mean: which of their places count, and what the model says there."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hfcompress.errors import DataError, ModelError

IGNORED = -100
# A class that does not exist for an item. Finite, so that 0 * (its log-probability) is 0 and not NaN.
ABSENT = -1e4

Batch = Mapping[str, Any]
Values = Literal["odds", "numbers", "vectors"]


class Outputs(ABC):
    """One kind of outputs; one subclass in one file each, frozen and without state.

    An *item* is a place that has a label: a row, a token, a question's start.  what: says in words what a model of
    this kind gives for an item.  values: what stands at a place:
    ``odds``, logits of a distribution over classes; ``numbers`` of a regression; ``vectors`` that embed a text.
    label_columns: what a batch holds for the task loss; none where there is no such loss.
    own_loss: the task loss is ``task_loss`` and not the model's.  ragged: padding counts as classes, with ABSENT.
    """

    what: ClassVar[str]
    values: ClassVar[Values] = "odds"
    label_columns: ClassVar[tuple[str, ...]] = ("labels",)
    own_loss: ClassVar[bool] = False
    ragged: ClassVar[bool] = False

    @abstractmethod
    def labels(self, batch: Batch) -> Tensor:
        """Return the labels as they stand beside ``logits``; what is not predicted is -100."""

    def labelled(self, batch: Batch) -> Tensor:
        """Mark, of any shape, the items over which the task loss is a mean."""
        return self.labels(batch) != IGNORED

    def compared(self, batch: Batch) -> Tensor:
        """Mark the places at which a student and a teacher are compared: those with a label, unless said otherwise.

        Raises ModelError for a batch without labels.
        """
        require_columns(self, batch, "the choice of places that count")
        return self.labelled(batch)

    @abstractmethod
    def logits(self, output: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return (*places, classes), with places as ``compared`` marks them; a class that is padding has ABSENT."""

    def task_loss(self, output: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return the mean of the task loss over the labelled items; used where ``own_loss``."""
        return output["loss"]

    def size(self, model: Any) -> int | None:
        """Return the last dimension of ``logits``, None where it differs from batch to batch."""
        return int(model.config.num_labels)

    def classes_in(self, batch: Batch) -> int | None:
        """Return the last dimension of ``logits`` for a batch where the model does not say it, else None."""
        return None

    def class_names(self, model: Any) -> list[str] | None:
        """Return what the model calls its classes, None where they are tokens or nothing."""
        return None


def require_columns(kind: Outputs, batch: Batch, what: str) -> None:
    """Raise ModelError unless a batch has the columns of labels that ``what`` needs."""
    for column in kind.label_columns:
        if column not in batch:
            raise ModelError(f"The batches hold no '{column}', only {', '.join(batch)}; {what} needs them.")


def refuse_other_places(marked: Tensor, places: Sequence[int]) -> None:
    """Raise DataError where labels are for more or fewer places than a model answers at.

    marked: as ``compared`` marks them.  places: the shape of the logits without their last dimension.
    """
    if marked.numel() != math.prod(places):
        raise DataError(
            f"The labels are for places {tuple(marked.shape)}, but the model answers at {tuple(places)}. Give a label "
            "for each, -100 where nothing is to be predicted."
        )


def logits_in(output: Mapping[str, Any], name: str = "logits") -> Tensor:
    """Return a tensor of a model's output.  Raises ModelError when it is not there."""
    found = output.get(name)
    if not isinstance(found, Tensor):
        raise ModelError(f"The model's output has no {name}, only {', '.join(output)}. Open it with its task's head.")
    return found


def label_names(config: Any) -> list[str]:
    """Return a classifier's class names in the order of its logits."""
    names: dict[int, str] = {int(index): name for index, name in (config.id2label or {}).items()}
    return [names[index] for index in sorted(names)]


def row_count(batch: Batch) -> int:
    """Return the number of rows of a batch."""
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


def every_row(batch: Batch) -> Tensor:
    """Mark every row of a batch: (rows,) true."""
    first = next(value for value in batch.values() if isinstance(value, Tensor))
    return torch.ones(len(first), dtype=torch.bool, device=first.device)
