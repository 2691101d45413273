"""What a teacher says of some places: all its logits, the most probable classes, or logits at places of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """The teacher's distribution at one temperature, class by class for the ``k`` most probable ones.

    classes: (rows, k) integers, distinct in each row.  log_probabilities: (rows, k).  log_tail: (rows,), the
    logarithm of the probability of all other classes together.  cut: see ``within``.
    """

    classes: Tensor
    log_probabilities: Tensor
    log_tail: Tensor
    temperature: float
    cut: bool = False

    def part(self, rows: slice) -> TopK:
        """Return some of the rows."""
        classes, log, tail = (one[rows] for one in (self.classes, self.log_probabilities, self.log_tail))
        return replace(self, classes=classes, log_probabilities=log, log_tail=tail)

    def to(self, device: torch.device | str) -> TopK:
        """Return the same on another device."""
        classes, log, tail = (one.to(device) for one in (self.classes, self.log_probabilities, self.log_tail))
        return replace(self, classes=classes, log_probabilities=log, log_tail=tail)

    def within(self, classes: int) -> TopK:
        """Return the distribution over the first ``classes`` classes alone, as softmax over their logits would be.

        Where some are left out it is ``cut``: class number ``classes``, of no probability, then stands for each.
        What the tail holds of them is not known and stays.
        """
        out = self.classes >= classes
        if not out.any():
            return self
        kept = self.log_probabilities.masked_fill(out, torch.finfo(self.log_probabilities.dtype).min / 2)
        mass = torch.logsumexp(torch.cat([kept, self.log_tail[:, None]], dim=-1), dim=-1)
        return TopK(
            self.classes.clamp_max(classes), kept - mass[:, None], self.log_tail - mass, self.temperature, cut=True
        )

    def cpu(self) -> TopK:
        """Return the same on the CPU."""
        return self.to("cpu")

    @staticmethod
    def cat(parts: Sequence[TopK]) -> TopK:
        """Return the rows of all parts, one after another."""
        columns = zip(*((one.classes, one.log_probabilities, one.log_tail) for one in parts))
        classes, log, tail = (torch.cat(column) for column in columns)
        return TopK(classes, log, tail, parts[0].temperature)


@dataclass(frozen=True)
class Elsewhere:
    """The logits of a teacher that reads a text in tokens of its own.

    logits: (the teacher's places, its classes).  places: (rows,) integers, the place that answers each row, -1 where
    none does.
    """

    logits: Tensor
    places: Tensor

    def part(self, rows: slice) -> Elsewhere:
        """Return what is said of some of the rows."""
        return Elsewhere(self.logits, self.places[rows])

    def at(self, rows: Tensor) -> Tensor:
        """Return the logits, (rows, classes), for rows that have a place.  rows: their indices."""
        return self.logits.index_select(0, self.places[rows])


Targets = Tensor | TopK | Elsewhere


def top_k_of(logits: Tensor, k: int, temperature: float) -> TopK:
    """Return the ``k`` most probable classes of each row of logits, (rows, classes), in float32 or better."""
    log = torch.log_softmax(logits / temperature, dim=-1)
    kept, classes = log.topk(k, dim=-1)
    rest = log.scatter(-1, classes, -torch.inf)
    floor = torch.finfo(log.dtype).min / 2  # k classes of k leave no tail, whose logarithm must not be infinite
    return TopK(classes, kept, torch.logsumexp(rest, dim=-1).clamp_min(floor), temperature)
