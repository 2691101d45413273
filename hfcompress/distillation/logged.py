"""What a distilling Trainer logs beside its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor


class LoggedTerms:
    """Sums of loss terms over the optimizer steps since the last log.

    steps: how many there are.  written: in how many of them the student wrote the texts, which have no task loss.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.steps = 0
        self.written = 0

    def add(self, **terms: Tensor) -> None:
        """Add a batch's part of its step's terms, scalars."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value.detach())) + value.detach()

    def means(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return every term's mean over the steps that have it.  gather: from all processes, as accelerate's."""
        return {
            name: float(gather(total.reshape(1)).mean()) / (self.steps - self.written * (name == "task_loss"))
            for name, total in self._sums.items()
        }


def last_terms(history: Sequence[Mapping[str, float]], names: Iterable[str]) -> dict[str, float]:
    """Return the terms of these names that were logged last; none before the first log."""
    last = next((logs for logs in reversed(history) if "kd_loss" in logs), {})
    return {name: last[name] for name in names if name in last}
