"""What GPTQ rounds a column to: the grid of its group, whose scale is found when the loop gets there or before it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from hfcompress.calibration.columns import in_turn_
from hfcompress.packed.packing import code_range
from hfcompress.quantization.grids import absmax_scale, affine_grid, dequantized, search_affine, search_scale
from hfcompress.quantization.options import ScaleSearch

KERNEL_COLUMNS = 128  # that one call of the kernel takes; a tile of so many has to fit into registers
KERNEL_SWITCH = "HFCOMPRESS_TRITON"


@dataclass(frozen=True)
class ColumnGrid:
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


class FixedScales(NamedTuple):
    """Scales that are there before the first column is rounded.

    scales, zeros: one (out,) float32 per group; the zero points are None on symmetric grids.  places: (in,), the group
    of each column in the order of the loop.
    """

    scales: list[Tensor]
    zeros: list[Tensor | None]
    places: Tensor

    @classmethod
    def search(cls, weight: Tensor, importance: Tensor, grid: ColumnGrid, places: Tensor) -> FixedScales:
        """Find each group's scale on the weights as they are.

        weight: (out, in) float32, with zeros where they stay.  importance: (in,), the weight of an error in a column.
        """
        groups = [(places == group).nonzero().squeeze(1) for group in range(int(places.max()) + 1)]
        columns = weight.T
        found = [grid.search(columns[group].contiguous(), importance[group]) for group in groups]
        return cls([scale for scale, _ in found], [zero for _, zero in found], places)


def kernel_runs_on(device: torch.device) -> bool:
    """Tell whether the Triton kernel rounds columns there: on GPUs, where it is installed and switched on.

    ``HFCOMPRESS_TRITON=1`` in the environment switches it on.  It is off by default while no GPU has run it.
    """
    return device.type == "cuda" and os.environ.get(KERNEL_SWITCH) == "1" and find_spec("triton") is not None


class GroupRounding:
    """Rounds columns to the grid of their group.

    codes: (in, out) int8.  scales, zeros: one (out,) per group so far; the zero points are None on symmetric grids.
    """

    def __init__(self, weight: Tensor, strength: Tensor, grid: ColumnGrid, fixed: FixedScales | None = None) -> None:
        """Start with no column rounded.  weight: (out, in).  strength: (in,), see ``HessianFactor``."""
        rows, columns = weight.shape
        self.grid, self.strength = grid, strength
        self.range = code_range(grid.bits)
        self.codes = torch.empty(columns, rows, dtype=torch.int8, device=weight.device)
        self.scales: list[Tensor] = [] if fixed is None else fixed.scales
        self.zeros: list[Tensor | None] = [] if fixed is None else fixed.zeros
        self.places: list[int] | None = None if fixed is None else fixed.places.tolist()

    def begin(self, start: int, target: Tensor) -> None:
        """Find the scale of the group that begins here, if it is not there yet."""
        if self.places is None:
            scale, zero = self.grid.search(target, self.strength[start : start + len(target)])
            self.scales.append(scale)
            self.zeros.append(zero)

    @property
    def run_length(self) -> int | None:
        """How many columns the kernel takes; None where there is no kernel."""
        return KERNEL_COLUMNS if kernel_runs_on(self.codes.device) else None

    def round_run_(
        self, start: int, target: Tensor, unit: Tensor, values: Tensor, error: Tensor, pruned: Tensor | None
    ) -> None:
        """Round columns ``start`` and on, and note their codes; see ``Rounding``."""
        stop = start + len(target)
        scale, zero = self._of_columns(self.scales, start, stop), None
        zeros = [one for one in self.zeros if one is not None]
        if zeros:
            zero = self._of_columns(zeros, start, stop)
        if kernel_runs_on(target.device):
            from hfcompress.quantization.column_kernel import round_run_

            round_run_(target, unit, values, error, self.codes[start:stop], scale, zero, pruned, self.grid)
            return
        steps = torch.empty_like(target)
        columns = list(zip(steps.unbind(), scale.unbind(), [None] * len(target) if zero is None else zero.unbind()))

        def became(column: int, wanted: Tensor) -> Tensor:
            step, own, shift = columns[column]
            torch.div(wanted, own, out=step)
            if shift is None:
                step.round_().clamp_(*self.range)
            else:
                step.add_(shift).round_().clamp_(*self.range).sub_(shift)
            if pruned is not None:
                step.masked_fill_(pruned[column], 0)
            return (step * own).to(self.grid.dtype)

        in_turn_(target, unit, values, error, became)
        values.copy_(dequantized(steps, scale, self.grid.dtype))
        self.codes[start:stop] = steps if zero is None else steps.add_(zero)

    def _of_columns(self, found: list[Tensor], start: int, stop: int) -> Tensor:
        """Return what belongs to each column, (columns, out); one row in memory where all share it."""
        if self.places is None:
            return found[-1].expand(stop - start, -1)
        return torch.stack([found[place] for place in self.places[start:stop]])
