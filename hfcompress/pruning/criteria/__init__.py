"""What makes a weight worth keeping: one file per criterion, and the names that options call them by."""

from __future__ import annotations

from hfcompress.pruning.criteria.activation import Activation
from hfcompress.pruning.criteria.base import Criterion, State
from hfcompress.pruning.criteria.magnitude import Magnitude
from hfcompress.pruning.criteria.movement import Movement
from hfcompress.pruning.criteria.random import Random
from hfcompress.pruning.criteria.taylor import Taylor

__all__ = ["CRITERIA", "Activation", "Criterion", "Magnitude", "Movement", "Random", "State", "Taylor", "criterion_of"]

CRITERIA: dict[str, type[Criterion]] = {
    "magnitude": Magnitude,
    "movement": Movement,
    "taylor": Taylor,
    "activation": Activation,
    "random": Random,
}


def criterion_of(name: str, seed: int) -> Criterion:
    """Make the criterion of this name.  seed: what ``random`` draws from; no other criterion looks at it."""
    return Random(seed) if name == "random" else CRITERIA[name]()
