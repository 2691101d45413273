"""Layers whose weight is rounded in every forward pass, and trained as if it were not.

A layer becomes one by a change of its class: its parameters, their names, the optimizer's hold on them and every hook
stay, so checkpoints hold the unrounded weights under their own names.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.rtn import Grid, Scale

Layer = TypeVar("Layer", bound="FakeQuantized")


class _StraightThrough(torch.autograd.Function):
    """Rounds; the gradient passes as if nothing had been rounded (Bengio et al., arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, grid: Grid) -> Tensor:
        return grid.rounded(matrix)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None


def round_straight_through(matrix: Tensor, grid: Grid) -> Tensor:
    """Return the matrix on its grid; its gradient is that of the result, unchanged.  matrix: (rows, columns)."""
    return _StraightThrough.apply(matrix, grid)


class FakeQuantized(nn.Module):
    """What all such layers have in common: a grid, and the class that they were."""

    dense_form: ClassVar[type[nn.Module]]
    dense_type: type[nn.Module]
    grid: Grid
    _kept: tuple[Any, Tensor] | None = None

    def rounded_weight(self) -> Tensor:
        """Return the whole weight on its grid.

        In evaluation mode without gradients it is kept until the weight changes: ``generate`` asks for each token.
        """
        weight: Any = self.weight
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.is_inference():
            return round_straight_through(weight, self.grid)
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self.grid.rounded(weight))
        return self._kept[1]

    def train(self: Layer, mode: bool = True) -> Layer:
        """Change the mode, and forget the weight that was kept."""
        self._kept = None
        return super().train(mode)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        group = "row" if self.grid.group_size is None else self.grid.group_size
        return f"{super().extra_repr()}, trained for bits={self.grid.bits}, group_size={group}"


class FakeQuantizedLinear(FakeQuantized, nn.Linear):
    """``nn.Linear`` as its packed form will compute it.  inputs: (..., in)."""

    dense_form = nn.Linear

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., out)."""
        return F.linear(inputs, self.rounded_weight(), self.bias)


class FakeQuantizedConv1D(FakeQuantized, Conv1D):
    """Transformers' ``Conv1D`` as its packed form will compute it; groups are of outputs.  inputs: (..., nx)."""

    dense_form = Conv1D
    bias: nn.Parameter
    nf: int

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., nf)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        return torch.addmm(self.bias, rows, self.rounded_weight()).view(*inputs.shape[:-1], self.nf)


class FakeQuantizedEmbedding(FakeQuantized, nn.Embedding):
    """``nn.Embedding`` as its packed form will look rows up: each has scales of its own.  ids: (...) integers."""

    dense_form = nn.Embedding

    def forward(self, ids: Tensor) -> Tensor:
        """Return (..., embedding_dim)."""
        found = super().forward(ids)
        return round_straight_through(found.reshape(-1, self.embedding_dim), self.grid).view(found.shape)


_KINDS = (FakeQuantizedLinear, FakeQuantizedConv1D, FakeQuantizedEmbedding)


def fake_quantize_(one: PlannedLinear, scale: Scale, dtype: torch.dtype | None) -> None:
    """Have a planned layer, and those that share its weight, round it from now on."""
    for module in {one.module, *one.also.values()}:
        kind = next(kind for kind in _KINDS if isinstance(module, kind.dense_form))
        module.dense_type = type(module)  # type: ignore[assignment]
        module.grid = one.grid(scale, dtype)  # type: ignore[assignment]
        module.__class__ = kind


def restore_dense_(model: nn.Module) -> None:
    """Make every layer that rounds its weight what it was before."""
    for module in model.modules():
        if isinstance(module, FakeQuantized):
            module.__class__ = module.dense_type  # type: ignore[assignment]
            for name in ("dense_type", "grid", "_kept"):
                module.__dict__.pop(name, None)
