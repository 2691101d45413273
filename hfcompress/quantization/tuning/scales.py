"""The scales of packed layers as parameters, while their codes stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.packed import PackedWeight
from hfcompress.packed.weight import values_of


class _Values(torch.autograd.Function):
    """``values_of`` for symmetric codes, with a gradient for the scales."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.groups = scale.shape[1]
        return values_of(codes, scale, None)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, Tensor]:
        (codes,) = ctx.saved_tensors
        return None, (slopes[0] * codes).view(len(codes), ctx.groups, -1).sum(-1)


class TunedScales:
    """A parameter for each packed layer: how its scales change, (rows, groups) float32, as a share of ``1 / 2**bits``.

    That is about how far a weight's rounding error is from the weight, so that one rate fits all bits.  Codes are kept
    unpacked meanwhile.
    """

    def __init__(self, layers: Sequence[PackedWeight]) -> None:
        self.layers = layers
        self.scales = [layer.weight_scale.float() for layer in layers]
        self.changes = [nn.Parameter(torch.zeros_like(scale)) for scale in self.scales]

    def in_force(self) -> AbstractContextManager[None]:
        """Have the layers compute with changed scales, through which gradients go."""
        return computing_with(
            self.layers, [partial(self._values, index, distances(layer)) for index, layer in enumerate(self.layers)]
        )

    @torch.no_grad()
    def write_(self) -> None:
        """Give the layers the changed scales."""
        for index, layer in enumerate(self.layers):
            layer.weight_scale.copy_(self.changed(index))

    def _values(self, index: int, codes: Tensor) -> Tensor:
        values: Tensor = _Values.apply(codes, self.changed(index))
        return values

    def changed(self, index: int) -> Tensor:
        """Return scales as they would be stored."""
        layer = self.layers[index]
        return (self.scales[index] * (1 + self.changes[index] / 2**layer.bits)).to(layer.weight_scale.dtype)


@contextmanager
def computing_with(layers: Sequence[PackedWeight], values: Sequence[Callable[[], Tensor]]) -> Iterator[None]:
    """Have packed layers compute with what functions return in the place of their matrices."""
    try:
        for layer, function in zip(layers, values):
            layer.__dict__["dequantize"] = function
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("dequantize", None)


def distances(layer: PackedWeight) -> Tensor:
    """Return how far each code is from the one that stands for 0, (rows, columns) int8 or, with zero points, int16."""
    codes, points = layer.codes(), layer.zero_point()
    if points is None:
        return codes
    groups = codes.short().view(len(codes), points.shape[1], -1)
    return (groups - points.unsqueeze(-1)).view(codes.shape)
