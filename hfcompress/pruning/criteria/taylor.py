"""Taylor: weights without which the loss would change least go first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hfcompress.pruning.criteria.base import State


@dataclass(frozen=True)
class Taylor:
    """Score a weight by a moving average of ``|w * gradient|`` (Molchanov et al., arXiv 1611.06440, section 2.2).

    The gradient is that of a whole optimizer step.  Clipping scales it all alike and so weighs steps, not weights.
    """

    needs_gradient: ClassVar[bool] = True
    needs_activations: ClassVar[bool] = False
    decay: float = 0.9

    def initial(self, weight: Tensor) -> State:
        """Start from zero; all weights have seen as many steps, so the order needs no correction for that."""
        return {"average": torch.zeros_like(weight, dtype=torch.float32)}

    def observe_(self, state: State, weight: Tensor, evidence: Tensor) -> None:
        """Average in ``|w * gradient|`` of one step."""
        state["average"].lerp_((weight.float() * evidence.float()).abs_(), 1 - self.decay)

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return the average."""
        return state["average"]
