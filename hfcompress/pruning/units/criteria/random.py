"""Random: the control that every other criterion must beat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hfcompress.pruning.criteria.base import OfWeightsAlone, State
from hfcompress.pruning.criteria.random import Random


@dataclass(frozen=True)
class UnitRandom(OfWeightsAlone):
    """Score a unit by a number drawn from the seed, the weight's name and the unit's place alone."""

    seed: int = 0

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return uniform numbers in [0, 1)."""
        return Random(self.seed).scores(name, weight[:, 0, 0], state)
