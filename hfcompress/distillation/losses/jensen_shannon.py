"""Generalised Jensen-Shannon divergence: between forward and reverse KL."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hfcompress.distillation.losses.base import FORBID, LogitLoss, Temperature
from hfcompress.distillation.losses.reverse_kl import reverse_kl
from hfcompress.distillation.losses.targets import Targets
from hfcompress.logits.forward_kl import forward_kl
from hfcompress.logits.softmax import softmax_and_log_sum


@dataclass(frozen=True, config=FORBID)
class JensenShannon(LogitLoss):
    """Generalised Jensen-Shannon divergence, the loss of GKD (Agarwal et al., arXiv 2306.13649).

    weight, final_weight: at the first step and, on a line from there, at the last.
    beta: 0 is forward KL, 1 is reverse KL, 0.5 the symmetric divergence.
    temperature: divides both models' logits; the loss is multiplied by its square.
    """

    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    temperature: Temperature = 1.0

    def rows(self, student: Tensor, teacher: Targets) -> tuple[Tensor, Tensor]:
        """Return ``jensen_shannon``, or the KL that stands for an end of its range."""
        assert isinstance(teacher, Tensor)
        if self.beta == 0:
            return forward_kl(student, teacher, self.temperature)
        if self.beta == 1:
            return reverse_kl(student, teacher, self.temperature)
        return jensen_shannon(student, teacher, self.beta, self.temperature)


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Return T^2 * (beta KL(p || m) + (1 - beta) KL(q || m)) of each row, and its gradient.

    p and q are the teacher's and the student's softmax at temperature T, m = beta p + (1 - beta) q (arXiv 2306.13649,
    equation 1).  student, teacher: (rows, classes) logits; 0 < beta < 1.
    """
    student, teacher = student / temperature, teacher / temperature
    q, log_sum_q = softmax_and_log_sum(student)
    p, log_sum_p = softmax_and_log_sum(teacher)
    # Where both probabilities are 0 their terms are, whatever the mixture's logarithm is, if it is finite.
    log_m = torch.lerp(q, p, beta).clamp_min_(torch.finfo(q.dtype).tiny).log_()
    from_student = student.sub_(log_sum_q[:, None]).sub_(log_m)
    from_teacher = teacher.sub_(log_sum_p[:, None]).sub_(log_m)
    expected = (q * from_student).sum(-1)
    loss = beta * (p * from_teacher).sum(-1) + (1 - beta) * expected
    slope = q.mul_(from_student.sub_(expected[:, None])).mul_((1 - beta) * temperature)
    return loss * temperature**2, slope
