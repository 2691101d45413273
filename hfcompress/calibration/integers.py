"""Gram matrices of bfloat16 inputs by products of 8-bit integers, on CPUs that do these several times as fast.

PyTorch has no product of bfloat16 matrices on CPUs that adds up in float32 and returns it, so that without matrix
tiles a Gram matrix costs float32 products, far slower than 8-bit ones (VNNI).  Each column is rounded to whole
numbers from -127 to 127 of a step of its own, and the integer product, which is exact, is multiplied by the steps.
What results is the exact Gram matrix of the rounded inputs, positive semidefinite as the true one is; rounding adds
about ``step**2 / 12`` per token to the diagonal, much as damping does.  Columns with outliers, where that is more than
``LARGEST_NOISE`` of what is there, are not rounded, and their products are made in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.devices import matrix_tiles, vector_integers

# Tokens of a product: what is held in float32 at once, or rounded with one step for each column. As integers the sums
# of 2**31 / 127**2 tokens at the most stay exact.
TOKENS = 4096
# Rows of a triangle's strip: narrow ones leave more out, and cost next to nothing where products run in AVX512.
NARROW_STRIP = 256
# What rounding may add to a column's sum of squares; GPTQ adds 1% of the mean to every column as damping.
LARGEST_NOISE = 0.003
# With more columns that are not rounded than this share, all of them are multiplied in float32.
LARGEST_REST = 0.25
LARGEST_CODE = 127


def integers_pay(inputs: Tensor) -> bool:
    """Tell whether this machine has fast integer products and no faster way to multiply these inputs."""
    many = min(inputs.shape) >= NARROW_STRIP
    return many and inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu" and integers_are_fast()


def integers_are_fast() -> bool:
    """Tell whether the CPU multiplies 8-bit integers faster than any float type with sums in float32."""
    return vector_integers() and not matrix_tiles()


@dataclass
class _Rounded:
    """Rows (tokens, size) as ``codes * step``, (tokens, size) int8 and (size,), but for some columns.

    rest: the columns with outliers, whose codes are 0.  exact: their values, (tokens, len(rest)) float32.
    """

    codes: Tensor
    step: Tensor
    rest: Tensor
    exact: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> _Rounded | None:
        """Return rows rounded; None where too many columns have outliers or a value is not finite."""
        step = torch.maximum(rows.amax(0), -rows.amin(0)).float() / LARGEST_CODE  # abs().amax() takes ten times this
        step = torch.where(step == 0, 1.0, step)  # a column of zeros
        codes = (rows / step).round_()
        squares = codes.square().sum(0)
        rest = ((squares > 0) & (squares * LARGEST_NOISE < len(rows) / 12)).nonzero().squeeze(-1)
        if len(rest) > LARGEST_REST * len(step) or not bool(squares.isfinite().all()):
            return None
        codes[:, rest] = 0
        return cls(codes.to(torch.int8), step, rest, rows[:, rest].float())

    def values(self) -> Tensor:
        """Return what stands for the rows, (tokens, size) float32."""
        values = self.codes * self.step
        values[:, self.rest] = self.exact
        return values


def add_integer_triangle_(hessian: Tensor, rows: Tensor) -> bool:
    """Add the lower triangle of the Gram matrix of rounded rows; where they cannot be rounded, only return False.

    hessian: (in, in) float32, changed in place, above the diagonal as well.  rows: (tokens, in), at most ``TOKENS``.
    """
    rounded = _Rounded.of(rows)
    if rounded is None:
        return False
    for first in range(0, len(hessian), NARROW_STRIP):
        last = first + NARROW_STRIP
        _add_product_(hessian[first:last, :last], rounded, slice(first, last), rounded, slice(0, last))
    if len(rounded.rest):
        product = rounded.exact.T @ rounded.values()
        hessian.index_add_(0, rounded.rest, product)
        product[:, rounded.rest] = 0  # already there
        hessian.index_add_(1, rounded.rest, product.T)
    return True


def add_integer_cross_(total: Tensor, left: Tensor, right: Tensor) -> bool:
    """Add ``left.T @ right`` of rounded rows; where they cannot be rounded, only return False.

    Both sides' rounding errors have nothing to do with each other, so they add none in the mean.
    total: (out, in) float32, changed in place.  left: (tokens, out).  right: (tokens, in), at most ``TOKENS``.
    """
    one, other = _Rounded.of(left), _Rounded.of(right)
    if one is None or other is None:
        return False
    _add_product_(total, one, slice(None), other, slice(None))
    if len(one.rest):
        total.index_add_(0, one.rest, one.exact.T @ other.values())
    if len(other.rest):
        total.index_add_(1, other.rest, (one.codes * one.step).T @ other.exact)
    return True


def _add_product_(total: Tensor, left: _Rounded, rows: slice, right: _Rounded, columns: slice) -> None:
    """Add the product of some columns of both, but for those that are not rounded.  total: changed in place."""
    product = torch._int_mm(left.codes[:, rows].T, right.codes[:, columns]).float()
    total.addcmul_(product.mul_(left.step[rows].unsqueeze(1)), right.step[columns])
