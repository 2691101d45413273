"""GPTQ for Transformers' ``Conv1D`` (GPT-2), whose weight is stored with inputs as rows.

The compressed-tensors format groups neighbours of a stored row, which here are outputs of one input. Every input
column of the layer thus has scales of its own, chosen when the loop reaches it, on values that hold earlier errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfcompress.calibration import ColumnPruning, compress_columns, factor_hessian
from hfcompress.calibration.columns import in_turn_
from hfcompress.calibration.hessian import relative_error
from hfcompress.quantization.gptq import GPTQResult
from hfcompress.quantization.grids import dequantized
from hfcompress.quantization.options import PLAIN, Steps
from hfcompress.quantization.rtn import Scale, round_to_nearest


def gptq_conv1d(
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
    """Quantize weights that see the same input; see ``gptq_siblings``.

    weights: (out_i, in) each.  group_size: outputs that share a scale, a divisor of each ``out_i``; None is all.
    steps: of which the scale counts alone; one column has one importance, so ``hessian`` is ``mse``.
    Returns codes (in, out_i) and scales and zero points (in, groups): as they are stored.
    """
    factor = factor_hessian(hessian, damping)
    results = []
    for weight, goal in zip(weights, goals or weights):
        dense = weight.detach().float()
        rounding = _OutputGroups(
            weight.dtype, bits, group_size, symmetric, "absmax" if steps.scale == "absmax" else "mse"
        )
        selection = None if prune is None else prune.selection([dense], factor)
        values = compress_columns(goal.detach().float(), factor, None, rounding, selection, dense == 0)
        error = relative_error(dense, values, hessian)
        points = torch.cat(rounding.points) if rounding.points else None
        codes, scale = torch.cat(rounding.codes), torch.cat(rounding.scales)
        results.append(GPTQResult(codes, scale, factor.damping, error, points))
    return results


class _OutputGroups:
    """Rounds each column to the grids of its groups of outputs.  codes, scales, points: (1, ...) per column so far."""

    def __init__(self, dtype: torch.dtype, bits: int, group_size: int | None, symmetric: bool, scale: Scale) -> None:
        self.dtype, self.bits, self.group_size = dtype, bits, group_size
        self.symmetric, self.scale = symmetric, scale
        self.codes: list[Tensor] = []
        self.scales: list[Tensor] = []
        self.points: list[Tensor] = []

    run_length = None

    def begin(self, start: int, target: Tensor) -> None:
        """Nothing is known of a block before its columns come."""

    def round_run_(
        self, start: int, target: Tensor, unit: Tensor, values: Tensor, error: Tensor, pruned: Tensor | None
    ) -> None:
        """Round columns, and note how they are stored; see ``Rounding``."""
        found: list[Tensor] = []

        def became(column: int, wanted: Tensor) -> Tensor:
            found.append(self._rounded(wanted, None if pruned is None else pruned[column]))
            return found[-1]

        in_turn_(target, unit, values, error, became)
        torch.stack(found, out=values)

    def _rounded(self, target: Tensor, pruned: Tensor | None) -> Tensor:
        """Return the values (out,) that a column gets, and note how they are stored."""
        kept = target if pruned is None else target.masked_fill(pruned, 0)
        found = round_to_nearest(
            kept.to(torch.float32).unsqueeze(0), self.bits, self.group_size, self.symmetric, self.scale, self.dtype
        )
        codes, scale, points = found
        self.codes.append(codes)
        self.scales.append(scale)
        groups = codes.float().view(scale.shape[1], -1)
        if points is not None:
            self.points.append(points)
            groups = groups - points.float().T
        return dequantized(groups, scale.float().T, self.dtype).flatten()
