"""What makes a head or neuron worth keeping: one file per criterion, and the names that options call them by.

They are criteria as ``hfcompress.pruning.criteria`` has them, over other rows: a weight, and its gradient, lies as
(units, features of a unit, outputs), which are the columns of the output projection by unit, and scores are (units,),
not negative.
"""

from __future__ import annotations

from hfcompress.pruning.criteria.base import Criterion
from hfcompress.pruning.units.criteria.activation import UnitActivation
from hfcompress.pruning.units.criteria.entropy import UnitEntropy
from hfcompress.pruning.units.criteria.magnitude import UnitMagnitude
from hfcompress.pruning.units.criteria.mutual_information import UnitMutualInformation
from hfcompress.pruning.units.criteria.random import UnitRandom
from hfcompress.pruning.units.criteria.taylor import UnitTaylor

__all__ = [
    "UNIT_CRITERIA",
    "UnitActivation",
    "UnitEntropy",
    "UnitMagnitude",
    "UnitMutualInformation",
    "UnitRandom",
    "UnitTaylor",
    "unit_criterion_of",
]

UNIT_CRITERIA: dict[str, type[Criterion]] = {
    "taylor": UnitTaylor,
    "magnitude": UnitMagnitude,
    "activation": UnitActivation,
    "entropy": UnitEntropy,
    "mutual_information": UnitMutualInformation,
    "random": UnitRandom,
}


def unit_criterion_of(name: str, seed: int, classes: int) -> Criterion:
    """Make the criterion of this name.

    seed: what ``random`` draws from.  classes: how many labels ``mutual_information`` tells apart.  No other
    criterion looks at them.
    """
    if name == "mutual_information":
        return UnitMutualInformation(classes)
    return UnitRandom(seed) if name == "random" else UNIT_CRITERIA[name]()
