"""Magnitude: the smallest weights of each layer go, whatever they are multiplied with."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from hfcompress.pruning.oneshot.options import FORBID_UNKNOWN, Sparsity, check_pattern, group_pattern
from hfcompress.pruning.patterns import pruned_by_pattern


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class Magnitude:
    """Prune the smallest weights of each layer; needs no data (Han et al., arXiv 1506.02626).

    sparsity: share of each layer's weights that is zero afterwards, in [0, 1).
    pattern: ``N:M``, such as ``2:4``, keeps N of every M neighbours along the input; None is unstructured.
    """

    needs_calibration: ClassVar[bool] = False

    sparsity: Sparsity = 0.5
    pattern: str | None = None

    def __post_init__(self) -> None:
        check_pattern(self.sparsity, self.pattern)


def magnitude_pruned(weight: Tensor, method: Magnitude) -> Tensor:
    """Return which weights are zero afterwards, a boolean tensor of the weight's shape; those that are zero stay.

    weight: (out, in), or of any shape where there is no pattern.
    """
    pruned = pruned_by_pattern(weight.detach().abs(), method.sparsity, group_pattern(method.pattern))
    return pruned | (weight == 0)
