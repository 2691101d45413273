"""How the scale of a group of weights is chosen, and how large the error of a choice is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hfcompress.packed.packing import code_range


class Rounded(NamedTuple):
    """A matrix on its grid: ``(codes - zero_point) * scale``.

    codes: (rows, columns) int8.  scale: (rows, groups).  zero_point: (rows, groups) int8, None where it is 0.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


SHRINK_FACTORS = tuple(1.1 - 0.025 * step for step in range(25))


def storable_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scales as they come back from storage in ``dtype``: float32, of the same sign, never zero."""
    stored = scale.to(dtype).float()
    size = stored.abs().clamp_min_(torch.finfo(dtype).tiny)
    return torch.where(scale == 0, 1.0, size.copysign_(scale))


def dequantized(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``codes * scale`` in float32, rounded as a product in ``dtype`` is."""
    product = codes * scale
    return product if dtype == torch.float32 else product.to(dtype).float()


def absmax_scale(weight: Tensor, bits: int, dtype: torch.dtype, dim: int = -1) -> Tensor:
    """Return the symmetric scale that spreads the codes as far as the largest absolute value, whose sign it chooses.

    There is one more code below 0 than above. Below 8 bits the largest value gets the lowest code, by a negative scale
    where it is positive, and values of the other sign lose at most one step (the "full range" of llama.cpp and
    AutoRound). At 8 bits, where one code more is worth nothing, scales stay positive and the largest value is divided
    by 127.5, so that both ends clip alike.
    weight: float32.  Returns float32 of the same shape with ``dim`` of size 1.
    """
    return storable_scale(_widest(weight, bits, dim), dtype)


def _widest(weight: Tensor, bits: int, dim: int) -> Tensor:
    """Return what ``absmax_scale`` is before it is stored."""
    low, high = code_range(bits)
    highest, lowest = weight.amax(dim, keepdim=True), weight.amin(dim, keepdim=True)
    if bits == 8:
        return torch.maximum(highest, -lowest) / ((high - low) / 2)
    return torch.where(highest > -lowest, highest, lowest) / low


def search_scale(columns: Tensor, importance: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the scale of each output row that gives the smallest weighted squared rounding error on a grid.

    The grid is the absmax scale times each of ``SHRINK_FACTORS``.  columns: (in, out) float32, one group of input
    columns.  importance: (in,), the weight of an error in each column.  Returns (out,) float32.
    """
    low, high = code_range(bits)
    widest = _widest(columns, bits, 0).squeeze(0)
    best = storable_scale(widest, dtype)
    smallest = torch.full_like(best, torch.inf)
    steps, nearest = torch.empty_like(columns), torch.empty_like(columns)
    for factor in SHRINK_FACTORS:
        scale = storable_scale(widest * factor, dtype)
        torch.div(columns, scale, out=steps)
        torch.round(steps, out=nearest).clamp_(low, high).sub_(steps).square_()
        error = torch.mv(nearest.T, importance) * scale.square()
        better = error < smallest
        smallest = torch.where(better, error, smallest)
        best = torch.where(better, scale, best)
    return best


def affine_grid(columns: Tensor, bits: int, dtype: torch.dtype, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return scale and zero point that spread the codes from the smallest to the largest value of each output row.

    The zero point is a code, so 0 stays exactly 0.  columns: (in, out) float32.  shrink: of the spread, towards 0.
    Returns (out,) float32 each; the zero point holds whole numbers.
    """
    low, high = code_range(bits)
    lowest, highest = columns.amin(0).clamp_max_(0), columns.amax(0).clamp_min_(0)
    scale = storable_scale((highest - lowest) * (shrink / (2**bits - 1)), dtype)
    return scale, (low - lowest * shrink / scale).round_().clamp_(low, high)


def search_affine(columns: Tensor, importance: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point of each output row with the smallest weighted squared rounding error.

    Searched as ``search_scale`` does, over spreads shrunk by ``SHRINK_FACTORS``; the same arguments.
    Returns (out,) float32 each.
    """
    low, high = code_range(bits)
    best, best_zero = affine_grid(columns, bits, dtype)
    smallest = torch.full_like(best, torch.inf)
    for factor in SHRINK_FACTORS:
        scale, zero = affine_grid(columns, bits, dtype, factor)
        steps = columns / scale
        nearest = (steps + zero).round_().clamp_(low, high).sub_(zero)
        error = torch.mv(nearest.sub_(steps).square_().T, importance) * scale.square()
        better = error < smallest
        smallest = torch.where(better, error, smallest)
        best, best_zero = torch.where(better, scale, best), torch.where(better, zero, best_zero)
    return best, best_zero
