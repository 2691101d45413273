"""Magnitude: units whose output is weighed little go first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hfcompress.pruning.criteria.base import OfWeightsAlone, State


@dataclass(frozen=True)
class UnitMagnitude(OfWeightsAlone):
    """Score a unit by the norm of the weights that read it: its columns of the output projection."""

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return the Euclidean norms."""
        return weight.float().flatten(1).norm(dim=1)
