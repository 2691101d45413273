"""Forward KL: the student covers everything that the teacher finds probable."""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from hfcompress.distillation.losses.base import FORBID, LogitLoss, Temperature
from hfcompress.distillation.losses.targets import Targets


@dataclass(frozen=True, config=FORBID)
class ForwardKL(LogitLoss):
    """KL of the student's from the teacher's distribution (Hinton et al., arXiv 1503.02531).

    weight, final_weight: at the first step and, on a line from there, at the last.
    temperature: divides both models' logits; the loss is multiplied by its square.
    """

    temperature: Temperature = 2.0

    def rows(self, student: Tensor, teacher: Targets) -> tuple[Tensor, Tensor]:
        """Return ``forward_kl``."""
        assert isinstance(teacher, Tensor)
        return forward_kl(student, teacher, self.temperature)


def forward_kl(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return T^2 * KL(softmax(teacher / T) || softmax(student / T)) of each row, and its gradient.

    student, teacher: (rows, classes) logits.  The factor T^2 keeps the gradient's size independent of the temperature
    (arXiv 1503.02531, section 2).  Natural logarithms.
    """
    log_q = torch.log_softmax(student / temperature, dim=-1)
    log_p = torch.log_softmax(teacher / temperature, dim=-1)
    p = log_p.exp()
    loss = log_p.sub_(log_q).mul_(p).sum(-1).mul_(temperature**2)
    return loss, log_q.exp_().sub_(p).mul_(temperature)
