"""Magnitude: small weights go first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hfcompress.pruning.criteria.base import State


@dataclass(frozen=True)
class Magnitude:
    """Score a weight by its absolute value (Han et al., arXiv 1506.02626)."""

    needs_gradient: ClassVar[bool] = False
    needs_activations: ClassVar[bool] = False

    def initial(self, weight: Tensor) -> State:
        """Nothing is kept."""
        return {}

    def observe_(self, state: State, weight: Tensor, evidence: Tensor) -> None:
        """Nothing is observed."""

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return ``|w|``."""
        return weight.float().abs()
