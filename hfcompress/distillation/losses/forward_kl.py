"""Forward KL: the student covers everything that the teacher finds probable."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from hfcompress.distillation.losses.base import FORBID, LogitLoss, Temperature
from hfcompress.distillation.losses.softmax import softmax_and_log_sum
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
    student, teacher = student / temperature, teacher / temperature
    q, log_sum_q = softmax_and_log_sum(student)
    p, log_sum_p = softmax_and_log_sum(teacher)
    # log p - log q is the logits' difference, but for a constant of the row.
    loss = teacher.sub_(student).mul_(p).sum(-1).add_(log_sum_q - log_sum_p).mul_(temperature**2)
    return loss, q.sub_(p).mul_(temperature)
