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
from hfcompress.quantization.grids import Rounded
from hfcompress.quantization.options import PLAIN, Order, Steps
from hfcompress.quantization.order import column_order, group_order
from hfcompress.quantization.refine import refine
from hfcompress.quantization.rounding import ColumnGrid, FixedScales, GroupRounding


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
    grid, stacked = ColumnGrid(bits, group_size, dtype, symmetric, steps.scale), torch.cat(list(goals or dense))
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
    weight: Tensor, hessian: Tensor, damping: float, grid: ColumnGrid, zeros: Tensor, order: Order
) -> tuple[tuple[Rounded, Tensor], float]:
    """Round a weight with its columns in another order than they are stored in; see ``_rounded``.

    Every column keeps the group that it is stored in, so the order is undone in the end. Returns the damping, too.
    """
    if order == "stored":
        factor = factor_hessian(hessian, damping)
        return _rounded(weight, factor, grid, zeros), factor.damping
    arrange = group_order if order == "groups" else column_order
    columns, groups = arrange(hessian.diagonal(), grid.group_size)
    factor = factor_hessian(hessian[columns][:, columns], damping)
    moved, gone, fixed = weight[:, columns], zeros[:, columns], None
    if order == "columns":
        places = columns // (grid.group_size or len(columns))
        fixed = FixedScales.search(moved.masked_fill(gone, 0), factor.strength, grid, places)
    rounded, values = _rounded(moved, factor, grid, gone, fixed=fixed)
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
    fixed = None
    if scale is not None:
        groups = list(scale.T.contiguous())
        places = torch.arange(weight.shape[1], device=weight.device) // (group_size or weight.shape[1])
        fixed = FixedScales(groups, [None] * len(groups), places)
    return _rounded(weight, factor, ColumnGrid(bits, group_size, dtype), weight == 0, fixed=fixed)[0][:2]


def _rounded(
    weight: Tensor,
    factor: HessianFactor,
    grid: ColumnGrid,
    zeros: Tensor,
    selection: Selection | None = None,
    fixed: FixedScales | None = None,
) -> tuple[Rounded, Tensor]:
    """Return codes, float32 scales and zero points, and the values (out, in) float32.

    fixed: scales to use; None finds one per row before the loop, and those of groups in it.
    """
    if fixed is None and grid.group_size is None:
        gone = zeros if selection is None else zeros | selection.choose(0, weight.T).T
        places = torch.zeros(weight.shape[1], dtype=torch.long, device=weight.device)
        fixed = FixedScales.search(weight.masked_fill(gone, 0), factor.strength, grid, places)
    rounding = GroupRounding(weight, factor.strength, grid, fixed)
    values = compress_columns(weight, factor, grid.group_size if fixed is None else None, rounding, selection, zeros)
    found = [zero.to(torch.int8) for zero in rounding.zeros if zero is not None]
    points = torch.stack(found, dim=1) if found else None
    return Rounded(rounding.codes.T.contiguous(), torch.stack(rounding.scales, dim=1), points), values
