"""Compress a weight column by column, and let later columns absorb the error: the loop of GPTQ and SparseGPT.

Written in the LDLQ form (QuIP, arXiv 2307.13304, theorem 6), which takes the same steps as Optimal Brain Surgeon in
a fixed order with one Cholesky factor and no inverse: with H = U D U^T, U unit upper triangular, column k is made from
``w_k + (W - Q)[:, :k] @ U[:k, k]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hfcompress.calibration.factor import HessianFactor

CHANNEL_BLOCK = 128
INNER_BLOCK = 16


class Rounding(Protocol):
    """Brings columns to a grid.  Tensors are float32, columns first."""

    def begin(self, start: int, target: Tensor) -> None:
        """Look at a block before its first column is rounded.  target: (columns, out), columns ``start`` and on."""

    def round(self, column: int, target: Tensor, pruned: Tensor | None) -> Tensor:
        """Return the values that a column gets.  target: (out,).  pruned: (out,) bool, the values that must be 0."""


@runtime_checkable
class RunRounding(Rounding, Protocol):
    """A rounding that can take many columns in one call, where nothing has to be chosen between them."""

    @property
    def run_length(self) -> int | None:
        """How many columns at the most; None where columns have to be taken one by one."""

    def round_run_(
        self, start: int, target: Tensor, unit: Tensor, values: Tensor, error: Tensor, pruned: Tensor | None
    ) -> None:
        """Round columns ``start`` and on; each one's error reaches those after it.

        target, values, error: (columns, out), what to round without the errors of these columns, what was there, and
        room for what was minus what is; values become what is.  unit: (columns, columns), rows as in the factor.
        pruned: (columns, out) bool, the values that must be 0.
        """


class Selection(Protocol):
    """Chooses weights to prune among columns as they are once the errors of earlier ones have reached them."""

    @property
    def period(self) -> int | None:
        """How many columns are chosen from together, just before the first of them; None is a whole block."""

    def choose(self, start: int, target: Tensor) -> Tensor:
        """Return which weights go, (columns, out) bool.  target: (columns, out) float32, columns ``start`` and on."""


@runtime_checkable
class ColumnPruning(Protocol):
    """A pruning method that chooses weights column by column, so that it can share a pass with rounding."""

    @property
    def damping(self) -> float:
        """Added to the Hessian's diagonal, as a share of its mean."""

    @property
    def period(self) -> int | None:
        """How many columns are chosen from together; None is a whole block."""

    def selection(self, weights: Sequence[Tensor], factor: HessianFactor) -> Selection:
        """Return the choice for the weights (out_i, in) of layers that are compressed side by side."""


def compress_columns(
    weight: Tensor,
    factor: HessianFactor,
    width: int | None = None,
    rounding: Rounding | None = None,
    selection: Selection | None = None,
    zeros: Tensor | None = None,
) -> Tensor:
    """Return the weight pruned by a selection, rounded, or both in one pass.  Zero weights stay zero.

    weight: (out, in) float32, not changed.  width: columns of a block, a multiple of the selection's period; None is
    about ``CHANNEL_BLOCK``.  zeros: (out, in) bool, what has to be 0; None is where the weight is.  Returns (out, in)
    float32, laid out columns first.
    """
    period = 1 if selection is None or selection.period is None else selection.period
    width = width or _multiple(period, CHANNEL_BLOCK)
    assert width % period == 0, f"blocks of {width} columns cut groups of {period}"
    columns = _Columns(weight, factor, rounding, selection, zeros)
    for start in range(0, weight.shape[1], width):
        columns.compress_block_(start, min(start + width, weight.shape[1]))
    return columns.values.T


def _multiple(period: int, size: int) -> int:
    """Return the largest multiple of ``period`` up to ``size``, or ``period`` itself."""
    return period * max(1, size // period)


class _Columns:
    """A weight on its way through the loop.  values, error, pruned: (in, out); error is what was minus what is.

    runs: takes ``step`` columns in one call, where there is such a rounding.
    """

    def __init__(
        self,
        weight: Tensor,
        factor: HessianFactor,
        rounding: Rounding | None,
        selection: Selection | None,
        zeros: Tensor | None,
    ) -> None:
        self.values = weight.T.clone(memory_format=torch.contiguous_format)
        self.error = torch.zeros_like(self.values)
        zeros = self.values == 0 if zeros is None else zeros.T.clone(memory_format=torch.contiguous_format)
        self.pruned = zeros if selection is not None or bool(zeros.any()) else None
        self.unit, self.rounding, self.selection = factor.unit, rounding, selection
        period = 1 if selection is None or selection.period is None else selection.period
        between = selection is not None and selection.period is not None
        self.runs = rounding if isinstance(rounding, RunRounding) and rounding.run_length and not between else None
        self.step = _multiple(period, INNER_BLOCK if self.runs is None else self.runs.run_length or INNER_BLOCK)

    def compress_block_(self, start: int, stop: int) -> None:
        """Compress columns ``start`` to ``stop``; the columns before them are done.

        Errors reach the next columns one by one and the others in one product, for less memory traffic.
        """
        target = self.values[start:stop].addmm(self.unit[:start, start:stop].T, self.error[:start])
        self._begin_block_(start, target)
        for first in range(start, stop, self.step):
            last = min(first + self.step, stop)
            self._compress_run_(first, target[first - start : last - start])
            if last < stop:
                target[last - start :].addmm_(self.unit[first:last, last:stop].T, self.error[first:last])

    def _compress_run_(self, first: int, target: Tensor) -> None:
        """Compress columns ``first`` and on, whose errors reach each other only."""
        last = first + len(target)
        if self.runs is not None:
            run = slice(first, last)
            gone = None if self.pruned is None else self.pruned[run]
            self.runs.round_run_(first, target, self.unit[run, run], self.values[run], self.error[run], gone)
            return
        for column in range(first, last):
            rest = target[column - first :]
            self._choose_group_(column, rest)
            self._compress_column_(column, rest[0])
            if column + 1 < last:
                rest[1:].addr_(self.unit[column, column + 1 : last], self.error[column])

    def _begin_block_(self, start: int, target: Tensor) -> None:
        """Choose what goes from a whole block, and let the rounding look at what stays of it."""
        if self.selection is None and self.rounding is None:
            return
        block = slice(start, start + len(target))
        gone = None if self.pruned is None else self.pruned[block]
        moved = self._moved(start, target)
        if self.selection is not None and gone is not None:
            if self.selection.period is None:
                gone |= self.selection.choose(start, moved)
            elif self.rounding is not None:
                # Groups are chosen when it is their turn; until then the rounding's scale relies on today's choice.
                gone = gone | self.selection.choose(start, moved)
        if self.rounding is not None:
            self.rounding.begin(start, moved if gone is None else moved.masked_fill(gone, 0))

    def _choose_group_(self, column: int, rest: Tensor) -> None:
        """Choose what goes from the group of columns that begins here.  rest: the columns from ``column`` on."""
        if self.selection is None or self.pruned is None or self.selection.period is None:
            return
        period = self.selection.period
        if column % period == 0:
            moved = self._moved(column, rest[:period])
            self.pruned[column : column + period] |= self.selection.choose(column, moved)

    def _moved(self, start: int, target: Tensor) -> Tensor:
        """Return columns as Optimal Brain Surgeon has them once all before ``start`` are done.

        A target adds the errors of the columns before as if the others between were not to move; all together move
        by the solution of X U = target - values for the block of U that lies between these columns.
        """
        block = slice(start, start + len(target))
        shift = target - self.values[block]
        shift = torch.linalg.solve_triangular(self.unit[block, block].T, shift, upper=False, unitriangular=True)
        return shift.add_(self.values[block])

    def _compress_column_(self, column: int, target: Tensor) -> None:
        gone = None if self.pruned is None else self.pruned[column]
        if self.rounding is not None:
            target = self.rounding.round(column, target, gone)
        elif gone is not None:
            target.masked_fill_(gone, 0)
        torch.sub(self.values[column], target, out=self.error[column])
        self.values[column] = target
