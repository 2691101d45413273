"""Magnitude: small weights go first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hfcompress.pruning.criteria.base import OfWeightsAlone, State


@dataclass(frozen=True)
class Magnitude(OfWeightsAlone):
    """Score a weight by its absolute value (Han et al., arXiv 1506.02626)."""

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return ``|w|``."""
        return weight.float().abs()
