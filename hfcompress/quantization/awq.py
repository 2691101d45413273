"""AWQ: columns that meet large inputs are scaled up before rounding, so that their error shrinks (arXiv 2306.00978).

Lin et al. measure an exponent's loss by running a block; here it is the same sum over tokens, tr(D H D^T), taken from
the Gram matrix H of the inputs, so that trying one costs no forward pass and no activations are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hfcompress.packed import values_of
from hfcompress.quantization.folding import around_one
from hfcompress.quantization.grids import Rounded
from hfcompress.quantization.options import FORBID_UNKNOWN, Bits, WhileLoading, scales
from hfcompress.quantization.rtn import round_to_nearest

SAMPLED_ROWS = 512  # of a weight, on which scales are compared; the winner has to be better on all


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class AWQ(WhileLoading):
    """Round to nearest, after scaling up the columns whose inputs are large (Lin et al., arXiv 2306.00978).

    bits: of one code.  group_size: input columns that share a scale; None is one scale per output row.
    grid: how many exponents from 0 up to 1 are tried for the scales of each layer; the one with the least error of
    its outputs wins, and 0 scales nothing.
    clip: search each group's range for the least error on the inputs' squares; kept where the whole error falls.
    exclude: name patterns (``fnmatch``) of linear layers that stay as they are.
    symmetric: code 0 stands for 0; otherwise each group also has a zero point.
    embeddings, head: round the input embeddings or the output head to nearest too; tied ones go together.
    """

    needs_calibration: ClassVar[bool] = True
    package: ClassVar[str] = "compressed_tensors"

    bits: Bits = 4
    group_size: Annotated[int, Field(ge=8)] | None = 128
    grid: Annotated[int, Field(ge=2)] = 20
    clip: bool = True
    exclude: tuple[str, ...] = ()
    symmetric: bool = True
    embeddings: bool = False
    head: bool = False

    @property
    def summary(self) -> str:
        """What the method does, for people."""
        return f"AWQ, {self.bits} bits, {scales(self.group_size)}"


@plain_dataclass(frozen=True)
class Reader:
    """A weight (out, in) float32 that reads scaled inputs, and its grid."""

    weight: Tensor
    bits: int
    group_size: int | None
    symmetric: bool
    dtype: torch.dtype

    def rounded(self, scale: Tensor | None = None, importance: Tensor | None = None) -> Rounded:
        """Round the weight times a scale for each column (in,).  importance: (in,), to search each group's range."""
        weight = self.weight if scale is None else self.weight * scale
        return round_to_nearest(
            weight, self.bits, self.group_size, self.symmetric, "absmax", self.dtype, importance=importance
        )

    def error(self, rounded: Rounded, hessian: Tensor, scale: Tensor | None = None) -> float:
        """Return the squared error of the outputs over all tokens, once the inputs are divided by the scale."""
        values = values_of(*rounded).float()
        difference = self.weight - (values if scale is None else values / scale)
        return float(torch.dot((difference @ hessian).flatten(), difference.flatten()))

    def sampled(self, rows: int) -> Reader:
        """Return at most so many of the outputs, evenly spaced: rows do not depend on each other."""
        step = -(-len(self.weight) // rows)
        return replace(self, weight=self.weight[::step].contiguous())


def search_scale_of_inputs(
    readers: Sequence[Reader], hessian: Tensor, unit_of_column: Tensor | None, units: int, grid: int
) -> Tensor:
    """Return the scale of each unit with the least error of the readers' rounded outputs, all 1 if none gains.

    A scale is a power of how large the unit's inputs are, by itself or over the same power of how large its weights
    are; around 1 on average.  hessian: (in, in) float32, the Gram matrix of the inputs.  unit_of_column: (in,), None
    where column i is unit i.  Returns (units,) float32.
    """
    columns = torch.arange(units, device=hessian.device) if unit_of_column is None else unit_of_column
    inputs = _root_mean_square(hessian.diagonal(), columns, units)
    squares = torch.stack([one.weight.square().mean(0) for one in readers]).mean(0)
    weights = _root_mean_square(squares, columns, units)
    none = torch.ones(units, device=hessian.device)
    candidates = [none]
    for exponent in (index / grid for index in range(1, grid)):
        candidates += [around_one(inputs**exponent), around_one(inputs**exponent / weights ** (1 - exponent))]

    def loss(scale: Tensor, some: Sequence[Reader]) -> float:
        of_column = scale[columns]
        return sum(one.error(one.rounded(of_column), hessian, of_column) for one in some)

    sample = [one.sampled(SAMPLED_ROWS) for one in readers]
    best = min(candidates, key=lambda scale: loss(scale, sample))
    return best if loss(best, readers) < loss(none, readers) else none


def _root_mean_square(squares: Tensor, columns: Tensor, units: int) -> Tensor:
    """Return one value per unit, (units,), of the mean squares of its columns, (in,); 0 for one without columns."""
    total = torch.zeros(units, device=squares.device).index_add_(0, columns, squares.clamp_min(0))
    count = torch.bincount(columns, minlength=units).clamp_min(1)
    return (total / count).sqrt()
