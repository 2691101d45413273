"""Random: the control that every other criterion must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hfcompress.pruning.criteria.base import State
from hfcompress.pruning.criteria.random import Random


@dataclass(frozen=True)
class UnitRandom:
    """Score a unit by a number drawn from the seed, the weight's name and the unit's place alone."""

    needs_gradient: ClassVar[bool] = False
    needs_activations: ClassVar[bool] = False
    seed: int = 0

    def initial(self, weight: Tensor) -> State:
        """Nothing is kept."""
        return {}

    def observe_(self, state: State, weight: Tensor, evidence: Tensor) -> None:
        """Nothing is observed."""

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return uniform numbers in [0, 1)."""
        return Random(self.seed).scores(name, weight[:, 0, 0], state)
