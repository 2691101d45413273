"""The part of a teacher's distribution that a cache keeps: its most probable classes and the mass of all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """The teacher's distribution at one temperature, class by class for the ``k`` most probable ones.

    classes: (rows, k) integers, distinct in each row.  log_probabilities: (rows, k).  log_tail: (rows,), the
    logarithm of the probability of all other classes together.
    """

    classes: Tensor
    log_probabilities: Tensor
    log_tail: Tensor
    temperature: float

    def part(self, rows: slice) -> TopK:
        """Return some of the rows."""
        return TopK(self.classes[rows], self.log_probabilities[rows], self.log_tail[rows], self.temperature)


def top_k_of(logits: Tensor, k: int, temperature: float) -> TopK:
    """Return the ``k`` most probable classes of each row of logits, (rows, classes), in float32 or better."""
    log = torch.log_softmax(logits / temperature, dim=-1)
    kept, classes = log.topk(k, dim=-1)
    rest = log.scatter(-1, classes, -torch.inf)
    floor = torch.finfo(log.dtype).min / 2  # k classes of k leave no tail, whose logarithm must not be infinite
    return TopK(classes, kept, torch.logsumexp(rest, dim=-1).clamp_min(floor), temperature)
