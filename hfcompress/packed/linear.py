"""A linear layer that keeps its weight as packed integer codes and scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hfcompress.packed.packing import pack_codes, packed_width, unpack_codes


class PackedLinear(nn.Module):
    """``nn.Linear`` whose weight is ``codes * scale``; its state dict is the compressed-tensors checkpoint format.

    weight_packed: (out, ceil(in * bits / 32)) int32.  weight_scale: (out, groups) in the model's dtype.
    weight_shape: (2,) int64.  bias: (out,) or None.  group_size: input columns that share a scale; None is one scale
    per output row. Only inputs get gradients: codes and scales are constants.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int | None,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if group_size is not None and in_features % group_size:
            raise ValueError(f"group_size {group_size} does not divide {in_features} input columns")
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        groups = in_features // group_size if group_size else 1
        words = torch.zeros(out_features, packed_width(in_features, bits), dtype=torch.int32, device=device)
        self.register_buffer("weight_packed", words)
        self.register_buffer("weight_scale", torch.ones(out_features, groups, dtype=dtype, device=device))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int, group_size: int | None
    ) -> PackedLinear:
        """Build the layer from signed codes.

        codes: (out, in) integers.  scale: (out, groups).  bias: (out,), kept as the same parameter if it is one.
        Raises ValueError when the shapes do not fit each other.
        """
        out_features, in_features = codes.shape
        module = cls(in_features, out_features, bits, group_size, bias=False, dtype=scale.dtype, device=codes.device)
        if scale.shape != module.weight_scale.shape:
            raise ValueError(f"scale has shape {tuple(scale.shape)}, not {tuple(module.weight_scale.shape)}")
        module.weight_packed = pack_codes(codes, bits)
        module.weight_scale = scale.detach().clone()
        if bias is not None:
            module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return module

    def codes(self) -> Tensor:
        """Return the signed codes, (out, in) int8."""
        return unpack_codes(self.weight_packed, self.bits, self.in_features)

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, (out, in) in the dtype of the scales.

        The product is taken in that dtype, as compressed-tensors does, so a stock reload has the same bits.
        """
        codes = self.codes().to(self.weight_scale.dtype)
        if self.group_size is None:
            return codes.mul_(self.weight_scale)
        groups = codes.view(self.out_features, -1, self.group_size)
        return groups.mul_(self.weight_scale.unsqueeze(-1)).view(self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight, made anew at each access; it is no parameter and not in the state dict."""
        return self.dequantize()

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer; inputs of another dtype than the scales' are computed in their own dtype.

        inputs: (..., in).  Returns (..., out).
        """
        weight: Tensor = self.dequantize()
        bias: Tensor | None = self.bias
        if weight.dtype != inputs.dtype and not torch.is_autocast_enabled(inputs.device.type):
            weight = weight.to(inputs.dtype)
            bias = bias if bias is None else bias.to(inputs.dtype)
        return functional.linear(inputs, weight, bias)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        group = "row" if self.group_size is None else self.group_size
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={group}"
        )
