"""Magnitude: units whose output is weighed little go first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hfcompress.pruning.criteria.base import State


@dataclass(frozen=True)
class UnitMagnitude:
    """Score a unit by the norm of the weights that read it: its columns of the output projection."""

    needs_gradient: ClassVar[bool] = False
    needs_activations: ClassVar[bool] = False

    def initial(self, weight: Tensor) -> State:
        """Nothing is kept."""
        return {}

    def observe_(self, state: State, weight: Tensor, evidence: Tensor) -> None:
        """Nothing is observed."""

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return the Euclidean norms."""
        return weight.float().flatten(1).norm(dim=1)
