"""Linear layers that keep a byte per weight and a scale per row, and may round their inputs too (W8A8).

Their state dict is compressed-tensors' ``int-quantized`` or ``float-quantized`` format.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import ModelError

Kind = Literal["int", "float"]
FORMATS: dict[Kind, str] = {"int": "int-quantized", "float": "float-quantized"}
DTYPES: dict[Kind, torch.dtype] = {"int": torch.int8, "float": torch.float8_e4m3fn}
# The lowest and the highest code, and what the largest value of a token is divided by for its scale.
LIMITS: dict[Kind, tuple[float, float, float]] = {"int": (-128.0, 127.0, 127.5), "float": (-448.0, 448.0, 448.0)}


class _Rounded(torch.autograd.Function):
    """Rounds, and lets gradients pass as if it had not."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, kind: Kind) -> Tensor:
        low, high, widest = LIMITS[kind]
        # Two dimensions share one scale: so does compressed-tensors, whose tokens are the second dimension.
        over = tuple(range(2, inputs.dim())) or tuple(range(inputs.dim()))
        scale = inputs.abs().amax(over, keepdim=True) / widest
        scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
        steps = (inputs / scale).clamp(low, high)
        codes = steps.round() if kind == "int" else steps.to(DTYPES[kind]).to(inputs.dtype)
        return codes * scale

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return gradients[0], None


def rounded_inputs(inputs: Tensor, kind: Kind) -> Tensor:
    """Return inputs as 8-bit codes times a scale for each token, chosen from the token itself.

    inputs: (batch, tokens, ..., in); (tokens, in) shares one scale, as compressed-tensors does.
    """
    return inputs if inputs.numel() == 0 else _Rounded.apply(inputs, kind)


class ByteLinear(nn.Module):
    """``nn.Linear`` whose weight is 8-bit codes times a scale for each output.

    weight: (out, in) int8 or float8_e4m3fn.  weight_scale: (out, 1) in the model's dtype.  bias: (out,) or None.
    activations: round the inputs as well, each token by a scale of its own.
    Only inputs get gradients: codes and scales are constants.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: Kind,
        activations: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.kind, self.activations = kind, activations
        codes = torch.zeros(out_features, in_features, dtype=DTYPES[kind], device=device)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", torch.ones(out_features, 1, dtype=dtype, device=device))
        self.register_parameter("bias", None)

    @classmethod
    def twin_of(cls, linear: nn.Linear, kind: Kind, activations: bool) -> ByteLinear:
        """Return an empty layer in the shape, dtype and mode of a dense one, with its bias."""
        weight = linear.weight
        twin = cls(linear.in_features, linear.out_features, kind, activations, weight.dtype, weight.device)
        twin.bias = linear.bias
        return twin.train(linear.training)

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, (out, in), multiplied in the dtype of the scales."""
        return self.weight.to(self.weight_scale.dtype) * self.weight_scale

    def nonzero(self) -> int:
        """Count the weights that are not zero."""
        return int(torch.count_nonzero(self.weight if self.kind == "int" else self.weight.float()))

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer.  inputs: (..., in).  Returns (..., out)."""
        if self.activations:
            inputs = rounded_inputs(inputs, self.kind)
        weight = self.dequantize()
        bias: Tensor | None = self.bias
        if weight.dtype != inputs.dtype and not torch.is_autocast_enabled(inputs.device.type):
            weight = weight.to(inputs.dtype)
            bias = bias if bias is None else bias.to(inputs.dtype)
        return functional.linear(inputs, weight, bias)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={DTYPES[self.kind]}, activations={self.activations}"
        )


def byte_layers(model: nn.Module) -> dict[str, ByteLinear]:
    """Return the layers of a model that keep a byte per weight, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ByteLinear)}


def byte_config(model: nn.Module) -> dict[str, Any]:
    """Describe a model's layers of bytes as compressed-tensors reads it.

    Raises ModelError when there are none, or when they are of several kinds.
    """
    layers = byte_layers(model)
    kinds = {(one.kind, one.activations) for one in layers.values()}
    if len(kinds) != 1:
        raise ModelError(f"{type(model).__name__} has layers of {len(kinds)} kinds of 8-bit codes; one is needed.")
    ((kind, activations),) = kinds
    both: dict[str, Any] = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "format": FORMATS[kind],
        "weights": {**both, "strategy": "channel", "group_size": None, "dynamic": False},
        "input_activations": {**both, "strategy": "token", "dynamic": True} if activations else None,
        "output_activations": None,
    }
    dense = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": FORMATS[kind],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": dense,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    # Stock Transformers unpacks such weights while it loads them; where inputs are rounded too, it must not.
    return config if activations else {**config, "dequantize": True}
