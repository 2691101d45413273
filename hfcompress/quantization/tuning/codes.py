"""The codes of packed layers as parameters, beside their scales: rounding that gradients pass through."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hfcompress.packed import PackedWeight
from hfcompress.packed.packing import pack_codes
from hfcompress.packed.weight import values_of
from hfcompress.quantization.tuning.scales import TunedScales, computing_with, distances

# Where a weight begins, as a share of the way from its code to the dense weight, or to the point half a code from it,
# where rounding changes: a step that is not meant must not change what GPTQ has weighed.
TOWARDS_DENSE = 0.7


class _Rounded(torch.autograd.Function):
    """``values_of`` rounded positions, with gradients for scales and, as if nothing were rounded, for positions.

    The latter is the straight-through estimator (arXiv 1308.3432).
    """

    @staticmethod
    def forward(ctx: Any, positions: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        codes = _round(positions, low, high)
        ctx.save_for_backward(codes, scale)
        return values_of(codes, scale, None)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None, None]:
        codes, scale = ctx.saved_tensors
        groups = slopes[0].float().view(*scale.shape, -1)
        for_scale = (groups * codes.view(groups.shape)).sum(-1).to(scale.dtype)
        return (groups * scale.unsqueeze(-1)).view(codes.shape), for_scale, None, None


def _round(positions: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the nearest codes of the grid as distances from the one that stands for 0, (rows, columns) int8 or int16.

    low, high: (rows, groups), the grid's ends.
    """
    groups = positions.round().view(*low.shape, -1)
    return groups.clamp_(low.unsqueeze(-1), high.unsqueeze(-1)).view(positions.shape).to(low.dtype)


class Learnt(NamedTuple):
    """Of one layer: distances as ``distances`` gives them, and scales."""

    codes: Tensor
    scale: Tensor


class LearntCodes:
    """Two parameters for each packed layer: its scales' changes, and where its weights lie on the grid.

    layers: each with its dense weight.  positions: (rows, columns) float32, in steps of the grid, 0 for what stands
    for 0.  ``fixed`` are zeros that stay: of weights that are 0, and all of them where ``zeros_stay``.
    """

    def __init__(self, layers: Sequence[tuple[PackedWeight, Tensor]], zeros_stay: bool) -> None:
        self.layers = [layer for layer, _ in layers]
        self.scales = TunedScales(self.layers)
        self.ends, self.positions, self.fixed = [], [], []
        for (layer, weight), scale in zip(layers, self.scales.scales):
            codes, points = distances(layer), layer.zero_point()
            middle = torch.zeros(scale.shape, dtype=codes.dtype, device=scale.device)
            middle = middle if points is None else middle - points
            half = 2 ** (layer.bits - 1)
            self.ends.append((middle - half, middle + (half - 1)))
            dense = weight.float().view(*scale.shape, -1) / scale.unsqueeze(-1)
            beside = (dense.view(codes.shape) - codes).nan_to_num_(0.0).clamp_(-0.5, 0.5)
            self.positions.append(nn.Parameter(codes + TOWARDS_DENSE * beside))
            self.fixed.append((codes == 0) if zeros_stay else (codes == 0) & (weight == 0))

    def in_force(self) -> AbstractContextManager[None]:
        """Have the layers compute with what has been learnt by then, through which gradients go."""
        return computing_with(self.layers, [partial(self._values, index) for index in range(len(self.layers))])

    def hold_fixed_(self) -> None:
        """Take away the gradients of weights that stay 0."""
        for positions, fixed in zip(self.positions, self.fixed):
            if positions.grad is not None:
                positions.grad.masked_fill_(fixed, 0.0)

    @torch.no_grad()
    def now(self) -> list[Learnt]:
        """Return what has been learnt by now."""
        return [
            Learnt(_round(positions, *ends), self.scales.changed(index))
            for index, (positions, ends) in enumerate(zip(self.positions, self.ends))
        ]

    @torch.no_grad()
    def take_(self, learnt: Sequence[Learnt]) -> None:
        """Give the layers, and those that share their tensors, what was learnt at some time."""
        for layer, (codes, scale) in zip(self.layers, learnt):
            points = layer.zero_point()
            stored = codes if points is None else codes.view(*points.shape, -1) + points.unsqueeze(-1)
            layer.weight_packed.copy_(pack_codes(stored.view(codes.shape).to(torch.int8), layer.bits))
            layer.weight_scale.copy_(scale)

    def _values(self, index: int) -> Tensor:
        values: Tensor = _Rounded.apply(self.positions[index], self.scales.changed(index), *self.ends[index])
        return values
