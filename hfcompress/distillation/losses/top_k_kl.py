"""Forward KL on the teacher's most probable classes, with the mass of all others kept as one class."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from hfcompress.distillation.losses.base import FORBID, LogitLoss, Temperature
from hfcompress.distillation.losses.targets import Targets, TopK, top_k_of
from hfcompress.logits.softmax import softmax_and_log_sum
from hfcompress.outputs import ABSENT


@dataclass(frozen=True, config=FORBID)
class TopKKL(LogitLoss):
    """Forward KL over the teacher's k most probable classes and one more that stands for all others.

    weight, final_weight: at the first step and, on a line from there, at the last.
    k: classes compared one by one; all of them where a row has fewer, as of choices or of places in a text.  A cached
    teacher has its own number.
    temperature: divides both models' logits; the loss is multiplied by its square.
    """

    takes_top_k: ClassVar[bool] = True
    k: Annotated[int, Field(ge=1)] = 64
    temperature: Temperature = 1.0

    def rows(self, student: Tensor, teacher: Targets) -> tuple[Tensor, Tensor]:
        """Return ``top_k_kl``; a teacher with all its classes is cut to ``k`` first."""
        if isinstance(teacher, Tensor):
            teacher = top_k_of(teacher, min(self.k, teacher.shape[-1]), self.temperature)
        assert isinstance(teacher, TopK)
        if not teacher.cut:
            return top_k_kl(student, teacher)
        loss, slope = top_k_kl(F.pad(student, (0, 1), value=ABSENT), teacher)
        return loss, slope[:, :-1]


def top_k_kl(student: Tensor, teacher: TopK) -> tuple[Tensor, Tensor]:
    """Return T^2 times the KL over k + 1 classes of each row, and its gradient.

    student: (rows, classes) logits.  The last of the k + 1 classes holds the tail of both distributions: so the
    student is not pulled to put all its mass on the teacher's k classes.
    """
    temperature = teacher.temperature
    student = student / temperature
    q, log_sum = softmax_and_log_sum(student)
    tiny = torch.finfo(q.dtype).tiny
    kept = student.gather(-1, teacher.classes) - log_sum[:, None]
    others = q.scatter(-1, teacher.classes, 0)
    tail = others.sum(-1)
    p, p_tail = teacher.log_probabilities.exp(), teacher.log_tail.exp()
    log_tail = tail.clamp_min(tiny).log()
    loss = (p * (teacher.log_probabilities - kept)).sum(-1) + p_tail * (teacher.log_tail - log_tail)
    # A stored distribution is rounded, so its mass is a little off one.
    slope = q.mul_((p.sum(-1) + p_tail)[:, None])
    slope.scatter_add_(-1, teacher.classes, -p)
    slope.sub_(others.mul_((p_tail / tail.clamp_min(tiny))[:, None]))
    return loss * temperature**2, slope.mul_(temperature)
