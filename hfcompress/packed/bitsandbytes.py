"""What is known of linear layers of bitsandbytes, which keep their weights in ways of their own.

The package is never imported here: where nobody has imported it, no model has such layers.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def bitsandbytes_layers(model: nn.Module) -> dict[str, Any]:
    """Return the linear layers of bitsandbytes in a model by name."""
    library: Any = sys.modules.get("bitsandbytes")
    if library is None:
        return {}
    kinds = (library.nn.Linear4bit, library.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def dense_shape(layer: Any) -> tuple[int, int]:
    """Return the shape that the dense weight has in its model: (out, in), but (in, out) in the place of a Conv1D."""
    sizes = (int(layer.out_features), int(layer.in_features))
    source: Any = getattr(layer, "source_cls", nn.Linear)
    return sizes[::-1] if issubclass(source, Conv1D) else sizes


def dequantized(layer: Any) -> Tensor:
    """Return the weight that the codes of a layer stand for, (out, in)."""
    functional: Any = sys.modules["bitsandbytes"].functional
    if not hasattr(layer, "state"):
        values: Tensor = functional.dequantize_4bit(*original_codes(layer))
        return values
    codes = layer.weight.data if layer.weight.CB is None else layer.weight.CB
    scale = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    rows: Tensor = functional.int8_vectorwise_dequant(codes, scale)
    return rows


def nonzero(layer: Any) -> int:
    """Count the weights of a layer that are not zero."""
    return int(torch.count_nonzero(dequantized(layer)))


def original_codes(layer: Any) -> tuple[Tensor, Any]:
    """Return the codes and the quantization state of a 4-bit layer as they were before its first call.

    Without a note of the state, its scales are what the call has left: rounded to bfloat16, but in their order.
    """
    data, state = layer.weight.data, layer.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return data, state
    before = copy.copy(getattr(layer, "state_before_calls", None))
    if before is None:
        before = copy.copy(state)
        before.absmax, before.nested = state.absmax.T.float().reshape(-1), False
        before.dtype, before.packing_format_for_cpu = state.original_dtype, False
    functional: Any = sys.modules["bitsandbytes"].functional
    return functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))[0], before


def keep_savable_(model: nn.Module) -> None:
    """Make all 4-bit layers of a model give the weight to save that they had before their first call.

    On processors with AVX512-BF16 the first call without gradients rearranges the codes of a layer and rounds its
    scales to bfloat16.  When such a layer is saved, the package brings back the codes but not the scales: what is
    saved, and the model itself from then on, would be another one.
    """
    for layer in bitsandbytes_layers(model).values():
        if not hasattr(layer, "state"):
            layer.register_forward_pre_hook(_note_state)
            layer.register_state_dict_pre_hook(_restore_)


def _note_state(layer: Any, args: Any) -> None:
    state = layer.weight.quant_state
    if state is not None and not getattr(state, "packing_format_for_cpu", False):
        layer.state_before_calls = copy.copy(state)


def _restore_(layer: Any, prefix: str, keep_vars: bool) -> None:
    """Undo what the first call did to a layer; its next call does it again."""
    layer.weight.data, layer.weight.quant_state = original_codes(layer)
    layer.quant_state = layer.weight.quant_state
