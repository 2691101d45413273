"""Cosine distance of logits."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from hfcompress.distillation.losses.base import FORBID, LogitLoss
from hfcompress.distillation.losses.targets import Targets

SMALLEST_NORM = 1e-8


@dataclass(frozen=True, config=FORBID)
class LogitCosine(LogitLoss):
    """One minus the cosine of the angle between the two models' logits.

    weight, final_weight: at the first step and, on a line from there, at the last.
    """

    of_distributions: ClassVar[bool] = False

    def rows(self, student: Tensor, teacher: Targets) -> tuple[Tensor, Tensor]:
        """Return ``logit_cosine``."""
        assert isinstance(teacher, Tensor)
        return logit_cosine(student, teacher)


def logit_cosine(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return one minus the cosine of each row, and its gradient.  student, teacher: (rows, classes) logits."""
    length = torch.linalg.vector_norm(student, dim=-1, keepdim=True).clamp_min_(SMALLEST_NORM)
    own, other = student / length, torch.nn.functional.normalize(teacher, dim=-1, eps=SMALLEST_NORM)
    cosine = (own * other).sum(-1, keepdim=True)
    return 1 - cosine.squeeze(-1), own.mul_(cosine).sub_(other).div_(length)
