"""What every distillation loss is: its weight, and how it reads the two models."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hfcompress.distillation.losses.targets import Targets

FORBID = ConfigDict(extra="forbid")
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=FORBID)
class Loss:
    """One term of the distillation loss; one subclass in one file each."""

    weight: Weight = 1.0
    final_weight: Weight | None = None

    def weight_at(self, progress: float) -> float:
        """Return the weight when this share of the training's steps is done: a line to ``final_weight``, if given."""
        if self.final_weight is None:
            return self.weight
        return self.weight + (self.final_weight - self.weight) * min(max(progress, 0.0), 1.0)


@dataclass(frozen=True, config=FORBID)
class LogitLoss(Loss):
    """A loss of one student answer and the teacher's answer at the same place.

    of_distributions: it compares the softmax of the two, so it means nothing for regression or independent labels.
    takes_top_k: it can do with the teacher's most probable classes alone.
    across_tokenizers: the teacher reads a row's text in tokens of its own.
    """

    of_distributions: ClassVar[bool] = True
    takes_top_k: ClassVar[bool] = False
    across_tokenizers: ClassVar[bool] = False

    @abstractmethod
    def rows(self, student: Tensor, teacher: Targets) -> tuple[Tensor, Tensor]:
        """Return the loss of each row, (rows,), and its gradient with respect to ``student``, (rows, classes).

        student, teacher: (rows, classes) logits in float32 or better, which must not be changed.
        """
