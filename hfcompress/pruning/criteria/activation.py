"""Activation: small weights on quiet inputs go first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hfcompress.pruning.criteria.base import State


@dataclass(frozen=True)
class Activation:
    """Score a weight by ``|w|`` times the norm of its input feature (Wanda, Sun et al., arXiv 2306.11695, section 3).

    The norm is the root mean square over tokens, padding left out where the attention mask is known, so that layers
    that see unlike numbers of tokens can be compared.  It is taken in the steps that prune; older ones count less.
    """

    needs_gradient: ClassVar[bool] = False
    needs_activations: ClassVar[bool] = True
    decay: float = 0.5

    def initial(self, weight: Tensor) -> State:
        """Start from no token."""
        return {"squares": torch.zeros(weight.shape[-1] + 1, dtype=torch.float32, device=weight.device)}

    def observe_(self, state: State, weight: Tensor, evidence: Tensor) -> None:
        """Add the squares and the number of tokens of one step."""
        state["squares"].mul_(self.decay).add_(evidence)

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return ``|w| * rms(input)``; weight: (outputs, inputs)."""
        squares = state["squares"]
        return weight.float().abs() * (squares[:-1] / squares[-1].clamp_min(1e-30)).sqrt()
