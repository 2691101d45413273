"""Round to nearest: every weight goes to the nearest point of its group's grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hfcompress.packed import code_range, values_of
from hfcompress.quantization.grids import Rounded, absmax_scale, affine_grid, search_affine, search_scale

Scale = Literal["absmax", "mse"]


def round_to_nearest(
    weight: Tensor,
    bits: int,
    group_size: int | None,
    symmetric: bool = True,
    scale: Scale = "absmax",
    dtype: torch.dtype | None = None,
    importance: Tensor | None = None,
) -> Rounded:
    """Quantize a weight without data.

    weight: (rows, columns).  group_size: columns that share a scale, a divisor of ``columns``; None is all.
    symmetric: code 0 stands for 0; otherwise each group has a zero point.  scale: from the group's largest values, or
    the one with the smallest squared rounding error.  dtype: of the scales; None is the weight's.
    importance: (columns,), the weight of an error in each column, by which the scale is searched then.  Zeros stay
    zeros.
    """
    rows, columns = weight.shape
    dtype = dtype or weight.dtype
    groups = weight.detach().float().reshape(-1, group_size or columns)
    if importance is None:
        found, zero = _grid(groups, bits, dtype, symmetric, scale == "mse")
    else:
        found, zero = _searched(groups.view(rows, -1, groups.shape[1]), importance, bits, dtype, symmetric)
    steps = groups / found.unsqueeze(1)
    if zero is not None:
        steps += zero.unsqueeze(1)
    codes = torch.round(steps).clamp_(*code_range(bits)).to(torch.int8)
    points = None if zero is None else zero.to(torch.int8).view(rows, -1)
    return Rounded(codes.view(rows, columns), found.to(dtype).view(rows, -1), points)


def _grid(
    groups: Tensor, bits: int, dtype: torch.dtype, symmetric: bool, search: bool
) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point of each row of ``groups``, (groups,) float32."""
    alike = torch.ones(groups.shape[1], device=groups.device)
    if symmetric:
        scale = search_scale(groups.T, alike, bits, dtype) if search else absmax_scale(groups, bits, dtype).squeeze(-1)
        return scale, None
    return search_affine(groups.T, alike, bits, dtype) if search else affine_grid(groups.T, bits, dtype)


def _searched(
    groups: Tensor, importance: Tensor, bits: int, dtype: torch.dtype, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point of each group, (rows * groups,) float32.  groups: (rows, groups, columns)."""
    scales, zeros = [], []
    for index, weights in enumerate(importance.view(groups.shape[1], -1)):
        columns = groups[:, index].T.contiguous()
        if symmetric:
            scales.append(search_scale(columns, weights, bits, dtype))
        else:
            scale, zero = search_affine(columns, weights, bits, dtype)
            scales.append(scale)
            zeros.append(zero)
    return torch.stack(scales, 1).flatten(), torch.stack(zeros, 1).flatten() if zeros else None


@dataclass(frozen=True)
class Grid:
    """How a stored matrix is rounded to nearest.

    dtype: what the matrix, and with it the scales, is rounded to first; None is its own.
    """

    bits: int
    group_size: int | None
    symmetric: bool = True
    scale: Scale = "absmax"
    dtype: torch.dtype | None = None

    def rounded(self, matrix: Tensor) -> Tensor:
        """Return the values that a packed layer will have, in the dtype of the matrix.  matrix: (rows, columns)."""
        stored = matrix.detach().to(self.dtype or matrix.dtype)
        found = round_to_nearest(stored, self.bits, self.group_size, self.symmetric, self.scale)
        return values_of(*found).to(matrix.dtype)
