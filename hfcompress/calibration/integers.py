"""Gram matrices of bfloat16 inputs by products of 8-bit integers, on CPUs that do these several times as fast.

PyTorch has no product of bfloat16 matrices on CPUs that adds up in float32 and returns it, so that without matrix
tiles a Gram matrix costs float32 products, far slower than 8-bit ones (VNNI).  Each column is rounded to whole
numbers from -127 to 127 of a step of its own, and the integer product, which is exact, is multiplied by the steps.
What results is the exact Gram matrix of the rounded inputs, positive semidefinite as the true one is; rounding adds
about ``step**2 / 12`` per token to the diagonal, much as damping does.  Columns with outliers, where that is more than
``LARGEST_NOISE`` of what is there, get a second number for what the first leaves, in steps 254 times finer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hfcompress.devices import matrix_tiles, vector_integers

# Tokens of a product: what is held in float32 at once, or rounded with one step for each column. As integers the sums
# of 2**31 / 127**2 tokens at the most stay exact.
TOKENS = 4096
# Rows of a triangle's strip: narrow ones leave more out, and cost next to nothing where products run in AVX512.
NARROW_STRIP = 256
# What rounding may add to a column's sum of squares; GPTQ adds 1% of the mean to every column as damping.
LARGEST_NOISE = 0.003
LARGEST_CODE = 127
FINER = 2 * LARGEST_CODE  # steps of the second number in half of one of the first, up and down
# Rows that are rounded at once, in a buffer that stays in the caches.
BUFFERED_ROWS = 512


def integers_pay(inputs: Tensor) -> bool:
    """Tell whether this machine has fast integer products and no faster way to multiply these inputs."""
    many = min(inputs.shape) >= NARROW_STRIP
    return many and inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu" and integers_are_fast()


def integers_are_fast() -> bool:
    """Tell whether the CPU multiplies 8-bit integers faster than any float type with sums in float32."""
    return vector_integers() and not matrix_tiles()


@dataclass(frozen=True)
class _Whole:
    """Some columns in whole numbers: ``codes * step``, (tokens, size) int8 and (size,) float32."""

    codes: Tensor
    step: Tensor

    def add_product_(self, other: _Whole, total: Tensor) -> Tensor:
        """Add the sum over tokens of one's columns times another's, and return that of their codes.

        total: (size, the other's size) float32.
        """
        # PyTorch 2.13 gives wrong products where all of the left matrix is a single row.
        codes = self.codes if self.codes.shape[1] > 1 else F.pad(self.codes, (0, 1))
        product = torch._int_mm(codes.T, other.codes)[: len(self.step)]
        total.addcmul_(product * self.step.unsqueeze(1), other.step)
        return product

    def product(self, other: _Whole) -> Tensor:
        """Return that sum alone."""
        total = torch.zeros(len(self.step), len(other.step))
        self.add_product_(other, total)
        return total

    def squares(self) -> Tensor:
        """Return the sum of each column's squared codes, (size,) float32."""
        parts = self.codes.split(BUFFERED_ROWS)
        return torch.stack([part.float().square_().sum(0) for part in parts]).sum(0)

    def columns(self, start: int, stop: int) -> _Whole:
        """Return some of the columns."""
        return _Whole(self.codes[:, start:stop], self.step[start:stop])


class RoundedRows:
    """Rows (tokens, size) as ``coarse``, and the columns that have outliers by ``finer`` in addition.

    squares: (size,) float32, the sums of squared codes where they are known already.
    """

    def __init__(self, rows: Tensor, coarse: _Whole) -> None:
        self.rows, self.coarse = rows, coarse
        self.squares: Tensor | None = None
        self._finer: tuple[Tensor, _Whole] | None = None

    @classmethod
    def of(cls, rows: Tensor) -> RoundedRows | None:
        """Return rows rounded; None where a value is not finite."""
        step = _largest(rows) / LARGEST_CODE
        if not bool(step.isfinite().all()):
            return None
        step.clamp_min_(torch.finfo(step.dtype).tiny)  # columns of zeros, too, have a step to divide by
        codes = torch.empty(rows.shape, dtype=torch.int8)
        times = step.reciprocal()
        buffer = torch.empty(min(BUFFERED_ROWS, len(rows)), rows.shape[1])
        for part, whole in zip(rows.split(BUFFERED_ROWS), codes.split(BUFFERED_ROWS)):
            whole.copy_(buffer[: len(part)].copy_(part).mul_(times).round_())
        return cls(rows, _Whole(codes, step))

    def finer(self) -> tuple[Tensor, _Whole]:
        """Return which columns have outliers, and what their codes leave of them in finer steps."""
        if self._finer is None:
            codes, step = self.coarse.codes, self.coarse.step
            squares = self.coarse.squares() if self.squares is None else self.squares
            rest = ((squares > 0) & (squares * LARGEST_NOISE < len(codes) / 12)).nonzero().squeeze(-1)
            left = self.rows[:, rest].float().mul_(step[rest].reciprocal()).sub_(codes[:, rest])
            self._finer = rest, _Whole(left.mul_(FINER).round_().to(torch.int8), step[rest] / FINER)
        return self._finer


def _largest(rows: Tensor) -> Tensor:
    """Return the largest absolute value of each column, (size,) float32; it is not finite where one value is not."""
    if rows.dtype != torch.bfloat16:
        return torch.maximum(rows.amax(0), -rows.amin(0)).float()
    # Without the sign, the bits of larger numbers are larger integers, which have faster instructions.
    parts = [(part & torch.iinfo(torch.int16).max).amax(0) for part in rows.view(torch.int16).split(BUFFERED_ROWS)]
    return torch.stack(parts).amax(0).view(torch.bfloat16).float()


def add_integer_triangle_(hessian: Tensor, rounded: RoundedRows) -> None:
    """Add the lower triangle of the Gram matrix of rounded rows, at most ``TOKENS``.

    hessian: (in, in) float32, changed in place, above the diagonal as well.
    """
    coarse, squares = rounded.coarse, []
    size = len(hessian)
    strip = -(-size // -(-size // NARROW_STRIP))  # all about as wide
    for first in range(0, size, strip):
        last = first + strip
        codes = coarse.columns(first, last).add_product_(coarse.columns(0, last), hessian[first:last, :last])
        squares.append(codes.diagonal(first).float())
    rounded.squares = torch.cat(squares)
    rest, fine = rounded.finer()
    if len(rest):
        mixed = fine.product(coarse)
        hessian.index_add_(1, rest, mixed.T)
        mixed.index_add_(1, rest, fine.product(fine))
        hessian.index_add_(0, rest, mixed)


def add_integer_cross_(total: Tensor, left: RoundedRows, right: RoundedRows) -> None:
    """Add ``left.T @ right`` of rounded rows, at most ``TOKENS``.

    Both sides' rounding errors have nothing to do with each other, so they add none in the mean.
    total: (left's size, right's size) float32, changed in place.
    """
    left.coarse.add_product_(right.coarse, total)
    (left_rest, left_fine), (rest, fine) = left.finer(), right.finer()
    if len(rest):
        total.index_add_(1, rest, left.coarse.product(fine))
    if len(left_rest):
        mixed = left_fine.product(right.coarse)
        if len(rest):
            mixed.index_add_(1, rest, left_fine.product(fine))
        total.index_add_(0, left_rest, mixed)
