"""Taylor: weights without which the loss would change least go first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hfcompress.pruning.criteria.base import State, no_steps, unbiased


@dataclass(frozen=True)
class Taylor:
    """Score a weight by a moving average of ``|w * gradient|`` (Molchanov et al., arXiv 1611.06440, section 2.2).

    The gradient is that of a whole optimizer step.  Clipping scales it all alike and so weighs steps, not weights.
    The average is over the steps that the weight had a gradient in, without a bias to zero where these are few.
    """

    needs_gradient: ClassVar[bool] = True
    needs_activations: ClassVar[bool] = False
    decay: float = 0.9

    def initial(self, weight: Tensor) -> State:
        """Start from zero and no step."""
        return {"average": torch.zeros_like(weight, dtype=torch.float32), "steps": no_steps(weight)}

    def observe_(self, state: State, weight: Tensor, evidence: Tensor) -> None:
        """Average in ``|w * gradient|`` of one step."""
        state["average"].lerp_((weight.float() * evidence.float()).abs_(), 1 - self.decay)
        state["steps"] += 1

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return the average."""
        return unbiased(state["average"], state["steps"], self.decay)
