"""Codes and scales made better after the loop: coordinate descent on the layer's error in the Hessian norm.

The loop never comes back to a column that it has rounded. Here every code is set to the best one given all others, as
is every group's scale given its codes (both have closed forms: the error is a quadratic of either). A step is taken
where it makes the error of its row smaller, so the error never grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfcompress.calibration.hessian import products_of
from hfcompress.packed.packing import code_range
from hfcompress.quantization.grids import Rounded, dequantized, storable_scale

BLOCK = 128


def refine(
    goal: Tensor, hessian: Tensor, rounded: Rounded, bits: int, dtype: torch.dtype, zeros: Tensor, sweeps: int
) -> tuple[Rounded, Tensor]:
    """Return better codes and scales, and the values that they stand for.

    goal: (out, in) float32, what the values should come near to.  hessian: (in, in) float32.  rounded: with scales
    (out, groups) float32.  dtype: of the stored scales.  zeros: (out, in) bool, what has to stay 0.  sweeps: how often
    all codes and scales are gone through.  Returns values (out, in) float32.
    """
    work = _Refinement(goal, hessian, rounded, bits, dtype, zeros)
    for _ in range(sweeps):
        work.sweep_()
    points = None if work.points is None else work.points.to(torch.int8)
    return Rounded((work.codes + work.offset()).to(torch.int8), work.scale, points), work.values


class _Refinement:
    """codes: (out, in) float32 less their zero points.  gradient: (values - goal) @ hessian, half the error's."""

    def __init__(
        self, goal: Tensor, hessian: Tensor, rounded: Rounded, bits: int, dtype: torch.dtype, zeros: Tensor
    ) -> None:
        self.goal, self.hessian, self.dtype, self.zeros = goal, hessian, dtype, zeros
        self.low, self.high = code_range(bits)
        self.scale = rounded.scale.float().clone()
        self.points = None if rounded.zero_point is None else rounded.zero_point.float()
        self.size = goal.shape[1] // self.scale.shape[1]
        self.codes = rounded.codes.float() - self.offset()
        self.values = dequantized(self.codes, self.scale.repeat_interleave(self.size, 1), dtype)
        self.gradient = torch.empty_like(goal)

    def offset(self) -> Tensor | float:
        """Return the zero point of every column, (out, in)."""
        return 0.0 if self.points is None else self.points.repeat_interleave(self.size, 1)

    def sweep_(self) -> None:
        """Go once through all codes, group by group, and through each group's scale after its codes."""
        # Made anew each time: rounding errors of the updates would add up.
        with products_of(self.hessian):
            self.gradient = (self.values - self.goal) @ self.hessian
        for group in range(self.scale.shape[1]):
            start, stop = group * self.size, (group + 1) * self.size
            for first in range(start, stop, BLOCK):
                self._improve_codes_(group, slice(first, min(first + BLOCK, stop)))
            self._refit_scale_(group, slice(start, stop))

    def _improve_codes_(self, group: int, block: slice) -> None:
        """Set the codes of some columns of a group to the best ones, column by column."""
        scale = self.scale[:, group]
        shift = 0.0 if self.points is None else self.points[:, group]
        curvature, local = self.hessian[block, block], self.gradient[:, block].T.contiguous()
        values, codes = self.values[:, block].T.contiguous(), self.codes[:, block].T.contiguous()
        stay = self.zeros[:, block].T
        moved = torch.zeros_like(values)
        for column in range(len(values)):
            curve = curvature[column, column]
            if curve <= 0:  # the column saw only zeros
                continue
            best = (values[column] - local[column] / curve).div_(scale).add_(shift).round_()
            best = best.clamp_(self.low, self.high).sub_(shift)
            step = dequantized(best, scale, self.dtype) - values[column]
            better = (step * (2 * local[column] + step * curve) < 0) & ~stay[column]
            step.masked_fill_(~better, 0)
            codes[column] = torch.where(better, best, codes[column])
            moved[column] = step
            local.addr_(curvature[column], step)
        self.values[:, block] += moved.T
        self.codes[:, block] = codes.T
        with products_of(self.hessian):
            self.gradient.addmm_(moved.T, self.hessian[block])

    def _refit_scale_(self, group: int, block: slice) -> None:
        """Set a group's scale in each row to the best one for its codes, as it is stored."""
        codes, gradient, curvature = self.codes[:, block], self.gradient[:, block], self.hessian[block, block]
        bend = (codes @ curvature).mul_(codes).sum(1)
        change = -(gradient * codes).sum(1) / bend.clamp_min(torch.finfo(torch.float32).tiny)
        wanted = self.scale[:, group] + change
        # A scale of the other sign would turn all codes round; it comes from errors that no scale makes good.
        fits = (bend > 0) & (wanted * self.scale[:, group] > 0)
        scale = torch.where(fits, storable_scale(wanted, self.dtype), self.scale[:, group])
        step = dequantized(codes, scale.unsqueeze(1), self.dtype) - self.values[:, block]
        gain = (step * (2 * gradient + step @ curvature)).sum(1)
        better = gain < 0
        step.masked_fill_(~better.unsqueeze(1), 0)
        self.scale[:, group] = torch.where(better, scale, self.scale[:, group])
        self.values[:, block] += step
        with products_of(self.hessian):
            self.gradient.addmm_(step, self.hessian[block])
