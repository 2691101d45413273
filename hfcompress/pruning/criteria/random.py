"""Random: the control that every other criterion must beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.pruning.criteria.base import OfWeightsAlone, State


@dataclass(frozen=True)
class Random(OfWeightsAlone):
    """Score a weight by a number drawn from the seed and the weight's name alone, the same in every process."""

    seed: int = 0

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return uniform numbers in [0, 1)."""
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(weight.shape, generator=generator).to(weight.device)
