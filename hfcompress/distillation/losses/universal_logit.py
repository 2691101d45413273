"""Universal logit distillation: how probable the first, second, third ... token is, whichever tokens those are."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from hfcompress.distillation.losses.base import FORBID, LogitLoss, Temperature
from hfcompress.distillation.losses.targets import Elsewhere, Targets


@dataclass(frozen=True, config=FORBID)
class UniversalLogit(LogitLoss):
    """Compare causal language models of different tokenizers (Boizard et al., arXiv 2402.12030).

    weight, final_weight: at the first step and, on a line from there, at the last.
    temperature: divides both models' logits.
    top: how many sorted probabilities are compared one by one, the mass of all others being one more; None is all,
    as in the paper, for which whole vocabularies are sorted.

    The teacher reads the text of each row in its own tokens.  The two models are compared where they have read the
    same text and are to say what comes next: after a student's token that ends at the character at which a token of
    the teacher's ends.  The loss is a mean over these places; at all others only the task loss counts.
    Limits: only sorted probabilities are compared, so the student learns how sure the teacher is and not of what:
    keep the task loss beside it.  Special tokens other than those that begin and end a text (a chat's, for example)
    are not text, and the teacher does not see them; it sees no more of a row than it has positions for.
    """

    across_tokenizers: ClassVar[bool] = True
    temperature: Temperature = 1.0
    top: Annotated[int, Field(ge=1)] | None = 256

    def rows(self, student: Tensor, teacher: Targets) -> tuple[Tensor, Tensor]:
        """Return ``sorted_distance`` where the teacher has a place for the row, and 0 elsewhere."""
        assert isinstance(teacher, Elsewhere)
        known = (teacher.places >= 0).nonzero().squeeze(-1)
        there, known = teacher.at(known).to(student), known.to(student.device)
        found = sorted_distance(student.index_select(0, known), there, self.temperature, self.top)
        loss, slope = student.new_zeros(len(student)), torch.zeros_like(student)
        return loss.index_copy_(0, known, found[0]), slope.index_copy_(0, known, found[1])


def sorted_distance(
    student: Tensor, teacher: Tensor, temperature: float, top: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sum of |q_i - p_i| over both distributions' sorted probabilities for each row, and its gradient.

    It is the optimal transport between them where every move costs the same (arXiv 2402.12030, section 3); the
    shorter one is filled up with zeros.  With ``top`` only so many come one by one, and the mass of the others of
    each is one number more: never more than the whole distance, and equal to it where no two of the gaps that are
    left out differ in sign.  student: (rows, classes).  teacher: (rows, other classes).  Logits.
    """
    q = torch.softmax(student / temperature, dim=-1)
    p = torch.softmax(teacher / temperature, dim=-1)
    own, order = q.topk(min(top or q.shape[1], q.shape[1]), dim=-1)
    theirs = p.topk(min(top or p.shape[1], p.shape[1]), dim=-1).values
    others = (1 - own.sum(-1)) - (1 - theirs.sum(-1))
    width = max(own.shape[1], theirs.shape[1])
    gap = F.pad(own, (0, width - own.shape[1])) - F.pad(theirs, (0, width - theirs.shape[1]))
    sign = others.sign()[:, None].expand_as(q).clone().scatter_(-1, order, gap[:, : own.shape[1]].sign())
    slope = q * (sign - (q * sign).sum(-1, keepdim=True)) / temperature
    return gap.abs().sum(-1) + others.abs(), slope
