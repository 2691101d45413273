"""How the scale of a group of weights is chosen, and how large the error of a choice is."""

from __future__ import annotations

from collections.abc import Sequence
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
SEARCHED = 1 << 21  # weights whose scales are searched at once


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
    return torch.cat([_searched_scale(part, importance, bits, dtype) for part in _parts(columns)])


def _parts(columns: Tensor) -> tuple[Tensor, ...]:
    """Return so many output rows each that what is held of them is small."""
    return columns.split(max(1, SEARCHED // len(columns)), 1)


def _searched_scale(columns: Tensor, importance: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    low, high = code_range(bits)
    widest = _widest(columns, bits, 0).squeeze(0)
    shrunk = columns.new_tensor(SHRINK_FACTORS).unsqueeze(1) * widest
    scales = storable_scale(shrunk, dtype)
    errors = torch.empty_like(scales)
    steps, nearest = torch.empty_like(columns), torch.empty_like(columns)
    for scale, error in zip(scales.unbind(), errors.unbind()):
        torch.div(columns, scale, out=steps)
        torch.round(steps, out=nearest).clamp_(low, high).sub_(steps).square_()
        torch.mv(nearest.T, importance, out=error)
    errors.mul_(scales.square())
    return _best(errors, scales, storable_scale(widest, dtype))


def _best(errors: Tensor, choices: Tensor, otherwise: Tensor) -> Tensor:
    """Return each row's choice with the smallest error, the first of several; another where none is finite.

    errors, choices: (choices, out).  otherwise: (out,).
    """
    smallest, place = errors.nan_to_num(nan=torch.inf).min(0)
    return torch.where(smallest < torch.inf, choices.gather(0, place.unsqueeze(0)).squeeze(0), otherwise)


def affine_grid(columns: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scale and zero point that spread the codes from the smallest to the largest value of each output row.

    The zero point is a code, so 0 stays exactly 0.  columns: (in, out) float32.
    Returns (out,) float32 each; the zero point holds whole numbers.
    """
    scale, zero = _affine_grids(columns, bits, dtype, (1.0,))
    return scale[0], zero[0]


def _affine_grids(columns: Tensor, bits: int, dtype: torch.dtype, shrink: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return what ``affine_grid`` does for spreads shrunk towards 0, (factors, out) each."""
    low, high = code_range(bits)
    factors = columns.new_tensor(shrink).unsqueeze(1)
    lowest, highest = columns.amin(0).clamp_max_(0), columns.amax(0).clamp_min_(0)
    scale = storable_scale((highest - lowest) * (factors / (2**bits - 1)), dtype)
    return scale, (low - lowest * factors / scale).round_().clamp_(low, high)


def search_affine(columns: Tensor, importance: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point of each output row with the smallest weighted squared rounding error.

    Searched as ``search_scale`` does, over spreads shrunk by ``SHRINK_FACTORS``; the same arguments.
    Returns (out,) float32 each.
    """
    found = [_searched_affine(part, importance, bits, dtype) for part in _parts(columns)]
    scales, zeros = zip(*found)
    return torch.cat(scales), torch.cat(zeros)


def _searched_affine(columns: Tensor, importance: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low, high = code_range(bits)
    scales, zeros = _affine_grids(columns, bits, dtype, SHRINK_FACTORS)
    errors = torch.empty_like(scales)
    steps, nearest = torch.empty_like(columns), torch.empty_like(columns)
    for scale, zero, error in zip(scales.unbind(), zeros.unbind(), errors.unbind()):
        torch.div(columns, scale, out=steps)
        torch.add(steps, zero, out=nearest).round_().clamp_(low, high).sub_(zero).sub_(steps).square_()
        torch.mv(nearest.T, importance, out=error)
    errors.mul_(scales.square())
    scale, zero = affine_grid(columns, bits, dtype)
    return _best(errors, scales, scale), _best(errors, zeros, zero)
