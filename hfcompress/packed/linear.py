"""Linear and embedding layers that keep their weight as packed integer codes and scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hfcompress.packed.packing import unpack_codes
from hfcompress.packed.weight import PackedWeight, rows_of_words, values_of

PACKABLE = (nn.Linear, Conv1D, nn.Embedding)


class _PackedProjection(PackedWeight):
    """What packed linear layers share: a bias, and the dtype they compute in."""

    bias: nn.Parameter | None

    def _operands(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias; inputs of another dtype than the scales' are computed in their own dtype."""
        weight: Tensor = self.dequantize()
        bias: Tensor | None = self.bias
        if weight.dtype != inputs.dtype and not torch.is_autocast_enabled(inputs.device.type):
            weight = weight.to(inputs.dtype)
            bias = bias if bias is None else bias.to(inputs.dtype)
        return weight, bias


class PackedLinear(_PackedProjection):
    """``nn.Linear`` with a packed weight: rows are outputs, columns are inputs.  bias: (out,) or None."""

    sizes = ("out_features", "in_features")
    in_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int | None,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        symmetric: bool = True,
    ) -> None:
        super().__init__(out_features, in_features, bits, group_size, symmetric, dtype, device)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        bits: int,
        group_size: int | None,
        zero_point: Tensor | None = None,
    ) -> PackedLinear:
        """Build the layer from signed codes; see ``PackedWeight.fill_``.  bias: kept if it is a parameter."""
        rows, columns = codes.shape
        module = cls(columns, rows, bits, group_size, False, scale.dtype, codes.device, zero_point is None)
        module.fill_(codes, scale, zero_point)
        if bias is not None:
            module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return module

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer.  inputs: (..., in).  Returns (..., out)."""
        return functional.linear(inputs, *self._operands(inputs))


class PackedConv1D(_PackedProjection):
    """Transformers' ``Conv1D`` (GPT-2's linear layer) with a packed weight: rows are inputs, columns are outputs.

    Its checkpoint holds the weight the way the dense one does, so groups are of outputs and each input has scales of
    its own.  bias: (nf,).
    """

    sizes = ("nx", "nf")
    nx: int
    nf: int

    def __init__(
        self,
        nx: int,
        nf: int,
        bits: int,
        group_size: int | None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        symmetric: bool = True,
    ) -> None:
        super().__init__(nx, nf, bits, group_size, symmetric, dtype, device)
        self.bias = nn.Parameter(torch.zeros(nf, dtype=dtype, device=device))

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer.  inputs: (..., nx).  Returns (..., nf)."""
        weight, bias = self._operands(inputs)
        assert bias is not None
        rows = inputs.reshape(-1, inputs.shape[-1])
        return torch.addmm(bias, rows, weight).view(*inputs.shape[:-1], self.nf)


class PackedEmbedding(PackedWeight):
    """``nn.Embedding`` with a packed weight: a row is one token's vector, and only rows that occur are unpacked."""

    sizes = ("num_embeddings", "embedding_dim")
    num_embeddings: int
    embedding_dim: int

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        group_size: int | None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        symmetric: bool = True,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, bits, group_size, symmetric, dtype, device)
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows up.  ids: (...) integers.  Returns (..., embedding_dim)."""
        rows = ids.flatten().long()
        codes = unpack_codes(self.weight_packed[rows], self.bits, self.columns)
        points = None if self.symmetric else rows_of_words(self.weight_zero_point, self.bits, rows)
        return values_of(codes, self.weight_scale[rows], points).view(*ids.shape, self.columns)


def has_packed_form(module: nn.Module) -> bool:
    """Tell whether a module is a linear or embedding layer that computes nothing beside its product or look-up.

    A class that only rounds the weight before it says so: its ``dense_form`` is the class whose form is packed.
    """
    form = getattr(type(module), "dense_form", type(module))
    return any(isinstance(module, kind) and form.forward is kind.forward for kind in PACKABLE)


def packed_twin(module: nn.Module, bits: int, group_size: int | None, symmetric: bool = True) -> PackedWeight:
    """Return an empty packed layer in the shape, dtype and mode of a dense one that has such a form, with its bias."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    common: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device, "symmetric": symmetric}
    twin: PackedWeight
    if isinstance(module, nn.Linear):
        twin = PackedLinear(module.in_features, module.out_features, bits, group_size, False, **common)
        twin.bias = module.bias
    elif isinstance(module, Conv1D):
        twin = PackedConv1D(module.nx, module.nf, bits, group_size, **common)
        twin.bias = module.bias
    else:
        assert isinstance(module, nn.Embedding)
        shape = (module.num_embeddings, module.embedding_dim)
        twin = PackedEmbedding(*shape, bits, group_size, padding_idx=module.padding_idx, **common)
    return twin.train(module.training)
