"""The divergence of one distribution over classes from another, and its gradient."""

from __future__ import annotations

from torch import Tensor

from hfcompress.logits.softmax import softmax_and_log_sum


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
