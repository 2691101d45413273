"""Entropy: heads that attend evenly go first."""

from __future__ import annotations

from dataclasses import dataclass

from hfcompress.pruning.units.criteria.base import MeanOverTokens


@dataclass(frozen=True)
class UnitEntropy(MeanOverTokens):
    """Score a head by how far the entropy of its attention lies below that of even attention, in nats per query.

    A head that spreads its attention evenly over all keys averages over them and tells nothing apart, while the heads
    that carry a model attend to few (Voita et al., arXiv 1905.09418, section 4; entropy as in Clark et al., arXiv
    1906.04341, section 3.3).  Even attention over ``n`` visible keys has the entropy ``log(n)``, so queries that may
    see unlike numbers of keys compare.  Padding is left out where the attention mask is known.  It is taken in the
    steps that prune; older ones count less.
    """
