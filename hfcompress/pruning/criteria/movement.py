"""Movement: weights that training moves towards zero go first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hfcompress.pruning.criteria.base import State


@dataclass(frozen=True)
class Movement:
    """Score a weight by the sum of ``-w * gradient`` over all steps (Sanh et al., arXiv 2005.07683, equation 2).

    Clipping scales a step's gradients all alike, so it changes what the step counts among other steps, never the
    order of weights within it; the clipped gradient is what moves the weight, so that one counts.  A pruned weight is
    zero and stays pruned, other than in the paper, where it can come back.
    """

    needs_gradient: ClassVar[bool] = True
    needs_activations: ClassVar[bool] = False

    def initial(self, weight: Tensor) -> State:
        """Start from zero."""
        return {"sum": torch.zeros_like(weight, dtype=torch.float32)}

    def observe_(self, state: State, weight: Tensor, evidence: Tensor) -> None:
        """Add ``-w * gradient`` of one step."""
        state["sum"].addcmul_(weight.float(), evidence.float(), value=-1)

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return the sum, which may be negative."""
        return state["sum"]
