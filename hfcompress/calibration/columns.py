"""Compress a weight column by column, and let later columns absorb the error: the loop of GPTQ and SparseGPT.

Written in the LDLQ form (QuIP, arXiv 2307.13304, theorem 6), which takes the same steps as Optimal Brain Surgeon in
a fixed order with one Cholesky factor and no inverse: with H = U D U^T, U unit upper triangular, column k is made from
``w_k + (W - Q)[:, :k] @ U[:k, k]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hfcompress.calibration.factor import HessianFactor

CHANNEL_BLOCK = 128
INNER_BLOCK = 16


class Rounding(Protocol):
    """Brings columns to a grid.  Tensors are float32, columns first."""

    @property
    def run_length(self) -> int | None:
        """How many columns it takes in one call at the most; None is as many as suit a loop over them."""

    def begin(self, start: int, target: Tensor) -> None:
        """Look at a block before its first column is rounded.  target: (columns, out), columns ``start`` and on."""

    def round_run_(
        self, start: int, target: Tensor, unit: Tensor, values: Tensor, error: Tensor, pruned: Tensor | None
    ) -> None:
        """Round columns ``start`` and on; each one's error reaches those after it.

        target, values, error: (columns, out), what to round without the errors of these columns, what was there, and
        room for what was minus what is; values become what is.  unit: (columns, columns), rows as in the factor.
        pruned: (columns, out) bool, the values that must be 0.
        """


def in_turn_(
    target: Tensor, unit: Tensor, values: Tensor, error: Tensor, became: Callable[[int, Tensor], Tensor]
) -> None:
    """Go through columns one by one, and let each one's error reach those after it; see ``Rounding.round_run_``.

    became: gets a column's place here and its target, and returns what becomes of it.  Values are not changed.
    """
    columns = zip(target.unbind(), unit.unbind(), values.unbind(), error.unbind())
    for column, (wanted, reach, before, lost) in enumerate(columns):
        torch.sub(before, became(column, wanted), out=lost)
        if column + 1 < len(target):
            target[column + 1 :].addr_(reach[column + 1 :], lost)


class _Unrounded:
    """Leaves columns what they have come to, but for what is pruned."""

    run_length = None

    def begin(self, start: int, target: Tensor) -> None:
        pass

    def round_run_(
        self, start: int, target: Tensor, unit: Tensor, values: Tensor, error: Tensor, pruned: Tensor | None
    ) -> None:
        def became(column: int, wanted: Tensor) -> Tensor:
            return wanted if pruned is None else wanted.masked_fill_(pruned[column], 0)

        in_turn_(target, unit, values, error, became)
        values.copy_(target)


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

    period: how many columns are chosen from together between others; None where nothing is chosen so.
    looks: whether anything wants to see a block before its first column is done.
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
        self.unit, self.selection = factor.unit, selection
        self.rounding: Rounding = rounding or _Unrounded()
        self.period = None if selection is None else selection.period
        self.looks = rounding is not None or (selection is not None and self.period is None)
        self.step = _multiple(self.period or 1, self.rounding.run_length or INNER_BLOCK)

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
        size = self.period or len(target)
        for start in range(first, last, size):
            stop = min(start + size, last)
            run, rest = slice(start, stop), target[start - first :]
            self._choose_group_(run, rest[:size])
            gone = None if self.pruned is None else self.pruned[run]
            self.rounding.round_run_(start, rest[:size], self.unit[run, run], self.values[run], self.error[run], gone)
            if stop < last:
                rest[size:].addmm_(self.unit[run, stop:last].T, self.error[run])

    def _begin_block_(self, start: int, target: Tensor) -> None:
        """Choose what goes from a whole block, and let the rounding look at what stays of it."""
        if not self.looks:
            return
        block = slice(start, start + len(target))
        gone = None if self.pruned is None else self.pruned[block]
        moved = self._moved(start, target)
        if self.selection is not None and gone is not None:
            if self.period is None:
                gone |= self.selection.choose(start, moved)
            else:
                # Groups are chosen when it is their turn; until then the rounding's scale relies on today's choice.
                gone = gone | self.selection.choose(start, moved)
        self.rounding.begin(start, moved if gone is None else moved.masked_fill(gone, 0))

    def _choose_group_(self, run: slice, target: Tensor) -> None:
        """Choose what goes from a group of columns, where that is done between others."""
        if self.selection is not None and self.pruned is not None and self.period is not None:
            self.pruned[run] |= self.selection.choose(run.start, self._moved(run.start, target))

    def _moved(self, start: int, target: Tensor) -> Tensor:
        """Return columns as Optimal Brain Surgeon has them once all before ``start`` are done.

        A target adds the errors of the columns before as if the others between were not to move; all together move
        by the solution of X U = target - values for the block of U that lies between these columns.
        """
        block = slice(start, start + len(target))
        # The inverse of a small block is made faster than X is solved.
        inverse = torch.eye(len(target), dtype=target.dtype, device=target.device)
        inverse = torch.linalg.solve_triangular(self.unit[block, block], inverse, upper=True, unitriangular=True)
        return self.values[block].addmm(inverse.T, target - self.values[block])
