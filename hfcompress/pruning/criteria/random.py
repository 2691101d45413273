"""Random: the control that every other criterion must beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hfcompress.pruning.criteria.base import State


@dataclass(frozen=True)
class Random:
    """Score a weight by a number drawn from the seed and the weight's name alone, the same in every process."""

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
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(weight.shape, generator=generator).to(weight.device)
