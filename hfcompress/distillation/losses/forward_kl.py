"""Forward KL: the student covers everything that the teacher finds probable."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from hfcompress.distillation.losses.base import FORBID, LogitLoss, Temperature
from hfcompress.distillation.losses.targets import Targets
from hfcompress.logits.forward_kl import forward_kl


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
