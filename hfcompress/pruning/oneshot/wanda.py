"""Wanda: of each output row the weights go that matter least for the inputs they meet (arXiv 2306.11695)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from hfcompress.pruning.oneshot.options import FORBID_UNKNOWN, Sparsity, check_pattern, group_pattern
from hfcompress.pruning.patterns import nofm_pruned, whole_units


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class Wanda:
    """Prune the weights with the smallest |w| * ||x||, row by row (Sun et al., arXiv 2306.11695).

    sparsity: share of each output row's weights that is zero afterwards, in [0, 1).
    pattern: ``N:M``, such as ``2:4``, keeps N of every M neighbours along the input; None is unstructured.
    """

    needs_calibration: ClassVar[bool] = True

    sparsity: Sparsity = 0.5
    pattern: str | None = None

    def __post_init__(self) -> None:
        check_pattern(self.sparsity, self.pattern)


def wanda_pruned(weight: Tensor, squares: Tensor, method: Wanda) -> Tensor:
    """Return which weights are zero afterwards, (out, in) bool; those that are zero stay.

    weight: (out, in).  squares: (in,), the sums of each column's squared inputs.
    """
    zeros = weight == 0
    # Zeros count before the weights of columns that saw nothing, or a row would lose more than asked.
    scores = (weight.detach().float().abs() * squares.sqrt()).masked_fill_(zeros, -1)
    pattern = group_pattern(method.pattern)
    if pattern is not None:
        return nofm_pruned(scores, pattern) | zeros
    count = whole_units(method.sparsity, weight.shape[1])
    smallest = torch.topk(scores, count, dim=1, largest=False, sorted=False).indices
    return zeros.scatter(1, smallest, True)
