"""SparseGPT: prune column by column, and let later columns absorb the error (Frantar and Alistarh, arXiv 2301.00774).

The loop over columns is ``hfcompress.calibration.columns``, GPTQ's own; here is which weights go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hfcompress.calibration import HessianFactor, Selection, compress_columns, factor_hessian
from hfcompress.calibration.hessian import relative_error
from hfcompress.pruning.oneshot.options import FORBID_UNKNOWN, Sparsity, check_pattern, group_pattern
from hfcompress.pruning.patterns import NofM, nofm_pruned, whole_units
from hfcompress.pruning.select import smallest


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class SparseGPT:
    """Prune what costs least and let the other weights absorb the error (Frantar and Alistarh, arXiv 2301.00774).

    sparsity: share of each layer's weights that is zero afterwards, in [0, 1).
    pattern: ``N:M``, such as ``2:4``, keeps N of every M neighbours along the input; None is unstructured.
    damping: added to the Hessian's diagonal, as a share of its mean.
    """

    needs_calibration: ClassVar[bool] = True

    sparsity: Sparsity = 0.5
    pattern: str | None = None
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01

    def __post_init__(self) -> None:
        check_pattern(self.sparsity, self.pattern)

    @property
    def period(self) -> int | None:
        """How many columns are chosen from together; None is a whole block."""
        pattern = group_pattern(self.pattern)
        return None if pattern is None else pattern.group

    def selection(self, weights: Sequence[Tensor], factor: HessianFactor) -> Selection:
        """Return the choice for weights (out_i, in) that are compressed side by side, each to its own sparsity."""
        # The weights of columns that saw only zeros cost nothing.
        importance = factor.strength.masked_fill(factor.dead, 0)
        pattern = group_pattern(self.pattern)
        if pattern is not None:
            return _InGroups(pattern, importance, torch.cat([weight.T == 0 for weight in weights], dim=1))
        return _InBlocks(importance, [_Budget.of(weight, self.sparsity) for weight in weights])


@plain_dataclass(frozen=True)
class SparseGPTResult:
    """weight: (out, in) in the dtype of the dense one.  damping_used: share of the mean diagonal.

    relative_error: sqrt(tr(D H D^T) / tr(W H W^T)) with the Hessian as given, for D = what was - what is.
    """

    weight: Tensor
    damping_used: float
    relative_error: float


def sparsegpt(weights: Sequence[Tensor], hessian: Tensor, method: SparseGPT) -> list[SparseGPTResult]:
    """Prune weights that see the same input, side by side: rows do not depend on each other.

    weights: (out_i, in) each, not changed.  hessian: (in, in) float32, the Gram matrix of the inputs.  Zero weights
    stay zero and count towards the sparsity.  Raises ModelError when the Hessian cannot be factored.
    """
    dense = [weight.detach().float() for weight in weights]
    factor = factor_hessian(hessian, method.damping)
    sparse = compress_columns(torch.cat(dense), factor, selection=method.selection(dense, factor))
    stored = [
        part.to(weight.dtype) for part, weight in zip(sparse.split([len(weight) for weight in weights]), weights)
    ]
    return [
        SparseGPTResult(after, factor.damping, relative_error(before, after, hessian))
        for before, after in zip(dense, stored)
    ]


def _costs(start: int, target: Tensor, importance: Tensor) -> Tensor:
    """Return the error that pruning each weight leaves once later columns have absorbed what they can."""
    return target.square() * importance[start : start + len(target), None]


@plain_dataclass(frozen=True)
class _InGroups:
    """Of every M neighbours the cheapest go, when it is their turn ("Extension to Semi-Structured Sparsity")."""

    pattern: NofM
    importance: Tensor
    zeros: Tensor

    @property
    def period(self) -> int | None:
        return self.pattern.group

    def choose(self, start: int, target: Tensor) -> Tensor:
        # Zeros count before the weights of columns that saw nothing, or a group would lose more than asked.
        costs = _costs(start, target, self.importance).masked_fill_(self.zeros[start : start + len(target)], -1)
        return nofm_pruned(costs.T, self.pattern).T


@plain_dataclass(frozen=True)
class _InBlocks:
    """Of every block of columns the cheapest weights go ("Adaptive Mask Selection"), of each layer the same share."""

    importance: Tensor
    budgets: Sequence[_Budget]

    @property
    def period(self) -> int | None:
        return None

    def choose(self, start: int, target: Tensor) -> Tensor:
        costs = _costs(start, target, self.importance)
        parts = costs.split([budget.zeros.shape[1] for budget in self.budgets], dim=1)
        return torch.cat([budget.cheapest(start, part) for budget, part in zip(self.budgets, parts)], dim=1)


@plain_dataclass(frozen=True)
class _Budget:
    """How many weights one layer loses in all, and in each block in proportion to those that are not zero yet.

    zeros: (in, out) bool.  live: how many are not zero in the columns before each, and in all; in + 1 counts.
    """

    zeros: Tensor
    live: Sequence[int]
    total: int

    @classmethod
    def of(cls, weight: Tensor, sparsity: float) -> _Budget:
        zeros = (weight == 0).T
        live = [0, *(~zeros).sum(dim=1).cumsum(0).tolist()]
        already = weight.numel() - live[-1]
        return cls(zeros, live, max(0, whole_units(sparsity, weight.numel()) - already))

    def cheapest(self, start: int, costs: Tensor) -> Tensor:
        """Mark the block's share of the budget among weights that are not zero yet."""
        stop = start + len(costs)
        before, after = (self.total * self.live[at] // max(1, self.live[-1]) for at in (start, stop))
        return smallest([costs.masked_fill(self.zeros[start:stop], torch.inf)], after - before)[0]
