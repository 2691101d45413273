"""KL of independent yes-or-no answers."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from hfcompress.distillation.losses.base import FORBID, LogitLoss, Temperature
from hfcompress.distillation.losses.targets import TopK


@dataclass(frozen=True, config=FORBID)
class BinaryKL(LogitLoss):
    """KL of each label's yes or no, for models whose labels do not exclude each other.

    weight, final_weight: at the first step and, on a line from there, at the last.
    temperature: divides both models' logits; the loss is multiplied by its square.
    """

    of_distributions: ClassVar[bool] = False
    temperature: Temperature = 2.0

    def rows(self, student: Tensor, teacher: Tensor | TopK) -> tuple[Tensor, Tensor]:
        """Return ``binary_kl``."""
        assert isinstance(teacher, Tensor)
        return binary_kl(student, teacher, self.temperature)


def binary_kl(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return T^2 times the mean over labels of KL(sigmoid(teacher / T) || sigmoid(student / T)), and its gradient.

    student, teacher: (rows, labels) logits.
    """
    own, other = student / temperature, teacher / temperature
    p = torch.sigmoid(other)
    yes = p * (F.logsigmoid(other) - F.logsigmoid(own))
    no = (1 - p) * (F.logsigmoid(-other) - F.logsigmoid(-own))
    slope = torch.sigmoid(own).sub_(p).mul_(temperature / student.shape[-1])
    return (yes + no).mean(-1) * temperature**2, slope
