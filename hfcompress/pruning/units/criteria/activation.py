"""Activation: quiet units go first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hfcompress.pruning.criteria.base import State


@dataclass(frozen=True)
class UnitActivation:
    """Score a unit by the sum of the squares of what it gives to the output projection, per token.

    Padding is left out where the attention mask is known.  It is taken in the steps that prune; older ones count less.
    """

    needs_gradient: ClassVar[bool] = False
    needs_activations: ClassVar[bool] = True
    decay: float = 0.5

    def initial(self, weight: Tensor) -> State:
        """Start from no token."""
        return {"squares": torch.zeros(len(weight) + 1, dtype=torch.float32, device=weight.device)}

    def observe_(self, state: State, weight: Tensor, evidence: Tensor) -> None:
        """Add the squares and the number of tokens of one step; evidence: (units + 1,)."""
        state["squares"].mul_(self.decay).add_(evidence)

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return the mean over tokens."""
        squares = state["squares"]
        return squares[:-1] / squares[-1].clamp_min(1e-30)
