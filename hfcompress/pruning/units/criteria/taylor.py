"""Taylor: units whose gate would change the loss least go first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hfcompress.pruning.criteria.base import State, no_steps, unbiased


@dataclass(frozen=True)
class UnitTaylor:
    """Score a unit by a moving average of ``|d loss / d gate|`` (Michel et al., arXiv 1905.10650, equation 2).

    A gate scales what the output projection reads of the unit, or just as well the columns that read it, so its
    gradient is the sum of weight times gradient over these columns: it costs no hook and no pass of its own.  The
    gradient is that of a whole optimizer step; the paper takes absolute values row by row.  The average is over the
    steps that the weight had a gradient in, without a bias to zero where these are few.
    """

    needs_gradient: ClassVar[bool] = True
    needs_activations: ClassVar[bool] = False
    decay: float = 0.98

    def initial(self, weight: Tensor) -> State:
        """Start from zero and no step."""
        average = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
        return {"average": average, "steps": no_steps(weight)}

    def observe_(self, state: State, weight: Tensor, evidence: Tensor) -> None:
        """Average in the size of the gates' gradients of one step."""
        gates = (weight.float() * evidence.float()).flatten(1).sum(1)
        state["average"].lerp_(gates.abs(), 1 - self.decay)
        state["steps"] += 1

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return the average."""
        return unbiased(state["average"], state["steps"], self.decay)
