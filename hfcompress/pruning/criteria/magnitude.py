"""Magnitude: small weights go first."""

from __future__ import annotations

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Score a weight by its absolute value (Han et al., arXiv 1506.02626).  Shape is kept."""
    return weight.detach().abs()
