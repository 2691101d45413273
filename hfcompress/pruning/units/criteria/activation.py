"""Activation: quiet units go first."""

from __future__ import annotations

from dataclasses import dataclass

from hfcompress.pruning.units.criteria.base import MeanOverTokens


@dataclass(frozen=True)
class UnitActivation(MeanOverTokens):
    """Score a unit by the sum of the squares of what it gives to the output projection, per token.

    Padding is left out where the attention mask is known.  It is taken in the steps that prune; older ones count less.
    """
