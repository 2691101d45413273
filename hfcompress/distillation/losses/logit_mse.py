"""Mean squared error of logits."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from hfcompress.distillation.losses.base import FORBID, LogitLoss
from hfcompress.distillation.losses.targets import Targets


@dataclass(frozen=True, config=FORBID)
class LogitMSE(LogitLoss):
    """Mean squared difference of the two models' logits (Kim et al., arXiv 2105.08919); for regression, too.

    weight, final_weight: at the first step and, on a line from there, at the last.
    """

    of_distributions: ClassVar[bool] = False

    def rows(self, student: Tensor, teacher: Targets) -> tuple[Tensor, Tensor]:
        """Return ``logit_mse``."""
        assert isinstance(teacher, Tensor)
        return logit_mse(student, teacher)


def logit_mse(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over the classes of the squared difference of each row, and its gradient.

    student, teacher: (rows, classes) logits.
    """
    difference = student - teacher
    return difference.square().mean(-1), difference.mul_(2 / student.shape[-1])
