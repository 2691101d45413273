"""Reverse KL: the student avoids everything that the teacher finds improbable."""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from hfcompress.distillation.losses.base import FORBID, LogitLoss, Temperature
from hfcompress.distillation.losses.targets import Targets


@dataclass(frozen=True, config=FORBID)
class ReverseKL(LogitLoss):
    """KL of the teacher's from the student's distribution, which seeks the teacher's modes (arXiv 2306.08543).

    weight, final_weight: at the first step and, on a line from there, at the last.
    temperature: divides both models' logits; the loss is multiplied by its square.
    """

    temperature: Temperature = 1.0

    def rows(self, student: Tensor, teacher: Targets) -> tuple[Tensor, Tensor]:
        """Return ``reverse_kl``."""
        assert isinstance(teacher, Tensor)
        return reverse_kl(student, teacher, self.temperature)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return T^2 * KL(softmax(student / T) || softmax(teacher / T)) of each row, and its gradient.

    student, teacher: (rows, classes) logits.
    """
    log_q = torch.log_softmax(student / temperature, dim=-1)
    ratio = log_q - torch.log_softmax(teacher / temperature, dim=-1)
    q = log_q.exp_()
    loss = (q * ratio).sum(-1)
    return loss * temperature**2, q.mul_(ratio.sub_(loss[:, None])).mul_(temperature)
