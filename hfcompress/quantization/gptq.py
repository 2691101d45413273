"""GPTQ: round column by column, and let later columns absorb the error (Frantar et al., arXiv 2210.17323).

The loop over columns is ``hfcompress.calibration.columns``; here is what a column is rounded to. A pruning method that
chooses columns in the same way joins the pass: weights that it prunes become 0, and later columns absorb both errors
(SparseGPT, arXiv 2301.00774, "Joint Sparsification & Quantization").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.calibration import ColumnPruning, HessianFactor, Selection, compress_columns, factor_hessian
from hfcompress.calibration.hessian import relative_error
from hfcompress.packed.packing import code_range
from hfcompress.quantization.grids import Rounded, absmax_scale, affine_grid, dequantized, search_affine, search_scale
from hfcompress.quantization.options import PLAIN, Order, ScaleSearch, Steps
from hfcompress.quantization.order import group_order
from hfcompress.quantization.refine import refine


@dataclass(frozen=True)
class GPTQResult:
    """codes: (out, in) int8.  scale: (out, groups) in the weight's dtype.  damping_used: share of the mean diagonal.

    relative_error: sqrt(tr(D H D^T) / tr(W H W^T)) with the Hessian as given, for D = what was - what is.
    zero_point: (out, groups) int8, the codes that stand for 0; None where that is code 0.
    """

    codes: Tensor
    scale: Tensor
    damping_used: float
    relative_error: float
    zero_point: Tensor | None = None

    @property
    def rounded(self) -> Rounded:
        """Return what is stored."""
        return Rounded(self.codes, self.scale, self.zero_point)


def gptq(weight: Tensor, hessian: Tensor, bits: int, group_size: int | None, damping: float = 0.01) -> GPTQResult:
    """Quantize one weight; see ``gptq_siblings``.

    weight: (out, in).  hessian: (in, in) float32, the Gram matrix of the inputs.
    """
    return gptq_siblings([weight], hessian, bits, group_size, damping)[0]


def gptq_siblings(
    weights: Sequence[Tensor],
    hessian: Tensor,
    bits: int,
    group_size: int | None,
    damping: float = 0.01,
    prune: ColumnPruning | None = None,
    symmetric: bool = True,
    goals: Sequence[Tensor] | None = None,
    steps: Steps = PLAIN,
) -> list[GPTQResult]:
    """Quantize weights that see the same input, stacked into one: rows do not depend on each other.

    weights: (out_i, in) each, of one dtype.  hessian: (in, in) float32, not changed.  group_size: input columns that
    share a scale, a divisor of ``in``; None is all.  prune: prunes each weight in the same pass, or before it where
    the error is smaller so.  symmetric: code 0 stands for 0; otherwise each group has a zero point.  goals: what to
    come near to instead of the weights, (out_i, in) float32 each.  steps: the loop's order and scales, and what comes
    after it; ``prune`` goes with the stored order only.  Zero weights stay zero and their rounding error is
    compensated.  Raises ModelError when the Hessian cannot be factored.
    """
    dtype = weights[0].dtype
    dense = [weight.detach().float() for weight in weights]
    grid, stacked = _Grid(bits, group_size, dtype, symmetric, steps.scale), torch.cat(list(goals or dense))
    zeros = torch.cat(dense) == 0
    if prune is None:
        ordered, damping = _in_order(stacked, hessian, damping, grid, zeros, steps.order)
        passes = [ordered]
    else:
        assert steps.order == "stored", "columns of a pruning pattern stay together"
        factor = factor_hessian(hessian, damping)
        damping = factor.damping
        passes = [_rounded(stacked, factor, grid, zeros, prune.selection(dense, factor))]
        # A choice that knows the rounding errors is the better one mostly, not always.
        sparse = compress_columns(stacked, factor, selection=prune.selection(dense, factor), zeros=zeros)
        passes.append(_rounded(sparse, factor, grid, sparse == 0))
    if steps.sweeps:
        gone = [zeros if prune is None else values == 0 for _, values in passes]
        passes = [
            refine(stacked, hessian, rounded, bits, dtype, mask, steps.sweeps)
            for (rounded, _), mask in zip(passes, gone)
        ]
    sizes = [len(weight) for weight in weights]
    results = [_results(dense, sizes, one, dtype, hessian, damping) for one in passes]
    return [min(choices, key=lambda result: result.relative_error) for choices in zip(*results)]


def _in_order(
    weight: Tensor, hessian: Tensor, damping: float, grid: _Grid, zeros: Tensor, order: Order
) -> tuple[tuple[Rounded, Tensor], float]:
    """Round a weight with its columns in another order than they are stored in; see ``_rounded``.

    Groups stay whole, so each is contiguous again once the order is undone. Returns the damping, too.
    """
    if order == "stored":
        factor = factor_hessian(hessian, damping)
        return _rounded(weight, factor, grid, zeros), factor.damping
    columns, groups = group_order(hessian.diagonal(), grid.group_size)
    factor = factor_hessian(hessian[columns][:, columns], damping)
    rounded, values = _rounded(weight[:, columns], factor, grid, zeros[:, columns])
    back, groups_back = columns.argsort(), groups.argsort()
    codes, scale, points = rounded
    stored = Rounded(
        codes[:, back], scale[:, groups_back], None if points is None else points[:, groups_back].contiguous()
    )
    return (stored, values[:, back]), factor.damping


def _results(
    dense: Sequence[Tensor],
    sizes: Sequence[int],
    rounded: tuple[Rounded, Tensor],
    dtype: torch.dtype,
    hessian: Tensor,
    damping: float,
) -> list[GPTQResult]:
    """Take stacked weights apart again."""
    (codes, scale, zero_point), quantized = rounded
    points = [None] * len(sizes) if zero_point is None else zero_point.split(sizes)
    return [
        GPTQResult(own_codes, own_scale.to(dtype), damping, relative_error(before, after, hessian), own_points)
        for own_codes, own_scale, own_points, before, after in zip(
            codes.split(sizes), scale.split(sizes), points, dense, quantized.split(sizes)
        )
    ]


def round_columns(
    weight: Tensor,
    factor: HessianFactor,
    bits: int,
    group_size: int | None,
    dtype: torch.dtype,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Round a weight column by column, block by block.

    A group's scale is searched on its weights as earlier groups' errors have moved them; one scale per row is searched
    on the weights as they are.  weight: (out, in) float32.  dtype: of the stored scales.  scale: (out, groups) float32
    to use instead.  Returns codes (out, in) int8 and scale (out, groups) float32.
    """
    return _rounded(weight, factor, _Grid(bits, group_size, dtype), weight == 0, scale=scale)[0][:2]


@dataclass(frozen=True)
class _Grid:
    """The points that a group of columns rounds to: ``bits`` wide codes times a scale that is stored in ``dtype``."""

    bits: int
    group_size: int | None
    dtype: torch.dtype
    symmetric: bool = True
    scale: ScaleSearch = "hessian"

    def search(self, columns: Tensor, importance: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point (out,) for columns (in, out); see ``search_scale``."""
        if self.scale == "absmax":
            if self.symmetric:
                return absmax_scale(columns, self.bits, self.dtype, dim=0).squeeze(0), None
            return affine_grid(columns, self.bits, self.dtype)
        if self.scale == "mse":
            importance = torch.ones_like(importance)
        if self.symmetric:
            return search_scale(columns, importance, self.bits, self.dtype), None
        return search_affine(columns, importance, self.bits, self.dtype)


def _rounded(
    weight: Tensor,
    factor: HessianFactor,
    grid: _Grid,
    zeros: Tensor,
    selection: Selection | None = None,
    scale: Tensor | None = None,
) -> tuple[Rounded, Tensor]:
    """Return codes, float32 scales and zero points, and the values (out, in) float32."""
    rounding = _GroupRounding(weight, factor, grid, zeros, selection, scale)
    values = compress_columns(weight, factor, grid.group_size, rounding, selection, zeros)
    found = [zero.to(torch.int8) for zero in rounding.zeros if zero is not None]
    points = torch.stack(found, dim=1) if found else None
    return Rounded(rounding.codes.T.contiguous(), torch.stack(rounding.scales, dim=1), points), values


class _GroupRounding:
    """Rounds columns to the grid of their group.

    codes: (in, out) int8.  scales, zeros: one (out,) per group so far; the zero points are None on symmetric grids.
    """

    def __init__(
        self,
        weight: Tensor,
        factor: HessianFactor,
        grid: _Grid,
        zeros: Tensor,
        selection: Selection | None,
        scale: Tensor | None,
    ) -> None:
        rows, columns = weight.shape
        self.grid, self.strength = grid, factor.strength
        self.range = code_range(grid.bits)
        self.codes = torch.empty(columns, rows, dtype=torch.int8, device=weight.device)
        self.rounded = torch.empty(rows, dtype=torch.float32, device=weight.device)
        self.given = scale
        self.given_zero: Tensor | None = None
        self.scales: list[Tensor] = []
        self.zeros: list[Tensor | None] = []
        if grid.group_size is None and scale is None:
            gone = zeros.T if selection is None else zeros.T | selection.choose(0, weight.T)
            kept = weight.T.masked_fill(gone, 0)
            found, self.given_zero = grid.search(kept.contiguous(), self.strength)
            self.given = found.unsqueeze(1)

    def begin(self, start: int, target: Tensor) -> None:
        """Find the scale of the group that begins here; one scale per row is found before the first column."""
        if self.given is None:
            importance = self.strength[start : start + len(target)]
            scale, zero = self.grid.search(target, importance)
            self.scales.append(scale)
            self.zeros.append(zero)
        elif start == 0 or self.grid.group_size is not None:
            group = 0 if self.grid.group_size is None else start // self.grid.group_size
            self.scales.append(self.given[:, group].contiguous())
            self.zeros.append(self.given_zero)

    def round(self, column: int, target: Tensor, pruned: Tensor | None) -> Tensor:
        """Return the values (out,) that a column gets, and note their codes."""
        scale, zero = self.scales[-1], self.zeros[-1]
        torch.div(target, scale, out=self.rounded)
        if zero is None:
            self.rounded.round_().clamp_(*self.range)
        else:
            self.rounded.add_(zero).round_().clamp_(*self.range).sub_(zero)
        if pruned is not None:
            self.rounded.masked_fill_(pruned, 0)
        self.codes[column] = self.rounded if zero is None else self.rounded + zero
        return dequantized(self.rounded, scale, self.grid.dtype)
