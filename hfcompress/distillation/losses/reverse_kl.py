"""Reverse KL: the student avoids everything that the teacher finds improbable."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from hfcompress.distillation.losses.base import FORBID, LogitLoss, Temperature
from hfcompress.distillation.losses.targets import Targets
from hfcompress.logits.softmax import softmax_and_log_sum


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
    student, teacher = student / temperature, teacher / temperature
    q, log_sum_q = softmax_and_log_sum(student)
    _, log_sum_p = softmax_and_log_sum(teacher)
    # log q - log p is the logits' difference, but for a constant of the row, of which the gradient knows nothing.
    difference = student.sub_(teacher)
    expected = (q * difference).sum(-1)
    loss = (expected + log_sum_p - log_sum_q).mul_(temperature**2)
    return loss, q.mul_(difference.sub_(expected[:, None])).mul_(temperature)
