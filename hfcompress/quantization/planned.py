"""One layer and the grid it gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfcompress.quantization.rtn import Grid, Scale

GROUP_MULTIPLE = 8
SMALLEST_HALF = 32


class LinearMethod(Protocol):
    """What the plan reads of a method's options; see ``RTN``."""

    @property
    def package(self) -> str: ...  # noqa: D102

    @property
    def bits(self) -> int | str: ...  # noqa: D102

    @property
    def group_size(self) -> int | None: ...  # noqa: D102

    @property
    def symmetric(self) -> bool: ...  # noqa: D102

    @property
    def embeddings(self) -> bool: ...  # noqa: D102

    @property
    def head(self) -> bool: ...  # noqa: D102

    @property
    def exclude(self) -> tuple[str, ...]: ...  # noqa: D102


@dataclass(frozen=True)
class PlannedLinear:
    """One layer and the grid it gets.

    name: the full name.  group_size: columns of the stored matrix that share a scale; None is one scale per row.
    also: other modules with the same weight by name, which become packed together with this one.
    """

    name: str
    module: nn.Module
    bits: int
    group_size: int | None
    requested_group_size: int | None
    symmetric: bool = True
    also: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def matrix(self) -> Tensor:
        """Return the weight as it is stored: (out, in), but (in, out) for Conv1D and (tokens, size) for embeddings."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    @property
    def weight(self) -> Tensor:
        """Return the weight of a linear layer as rows of outputs, (out, in)."""
        return self.as_weight(self.matrix)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix as it is stored as rows of outputs."""
        return matrix.T if isinstance(self.module, Conv1D) else matrix

    def grid(self, scale: Scale, dtype: torch.dtype | None = None) -> Grid:
        """Return how the stored matrix is rounded to nearest."""
        return Grid(self.bits, self.group_size, self.symmetric, scale, dtype)


def fitting_group_size(in_features: int, requested: int | None) -> int | None:
    """Return ``requested`` if it divides ``in_features``, or else a smaller size that does.

    Halves of what was requested come first, down to 32: serving engines have kernels for them.  Then the largest
    divisor that is a multiple of 8.  None is one scale per row: what was asked for, or the only choice left.
    """
    if requested is None:
        return None
    if in_features % requested == 0:
        return requested
    halves = [requested // 2**times for times in range(1, requested.bit_length()) if requested % 2**times == 0]
    sizes = [*(half for half in halves if half >= SMALLEST_HALF), *range(min(requested, in_features), 0, -1)]
    return next((size for size in sizes if size % GROUP_MULTIPLE == 0 and in_features % size == 0), None)
