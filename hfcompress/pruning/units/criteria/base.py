"""What criteria of units have in common that average evidence over tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hfcompress.pruning.criteria.base import State


@dataclass(frozen=True)
class MeanOverTokens:
    """Scores a unit by the mean of its evidence over tokens, in which older steps count less."""

    needs_gradient: ClassVar[bool] = False
    needs_activations: ClassVar[bool] = True
    decay: float = 0.5

    def initial(self, weight: Tensor) -> State:
        """Start from no token."""
        return {"sums": torch.zeros(len(weight) + 1, dtype=torch.float32, device=weight.device)}

    def observe_(self, state: State, weight: Tensor, evidence: Tensor) -> None:
        """Add the sums and the number of tokens of one step; evidence: (units + 1,)."""
        state["sums"].mul_(self.decay).add_(evidence)

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return the mean over tokens."""
        sums = state["sums"]
        return sums[:-1] / sums[-1].clamp_min(1e-30)
