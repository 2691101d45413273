"""Packed checkpoints that stay packed: loaded, run and saved again, they come out as they went in.

Stock Transformers unpacks a compressed-tensors checkpoint while it loads it or at the first call, and would save it
dense.  What was loaded is on the grid of its scales, so its codes can be found again, exactly; weights that have been
trained since are not, and are then saved dense.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.compressed_tensors import (
    CompressedTensorsDequantize,
    get_dense_scheme,
    get_experts_scheme,
)
from transformers.quantizers import auto
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from hfcompress.loading.experts import Stored, stored_experts, with_split_experts

COMPRESSED_TENSORS = "compressed-tensors"
FORMATS = ("pack-quantized", "int-quantized", "float-quantized")


class _Notes(dict[str, Stored]):
    """By module.  Transformers copies its loading operations, and what hangs on them, for each weight; not this."""

    def __deepcopy__(self, memo: Any) -> _Notes:
        return self


class _DequantizeAndNote(CompressedTensorsDequantize):
    """Unpacks weights while they load, and notes the scales that lead back to their codes."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> Any:
        if "weight_packed" in input_dict or "weight_scale" in input_dict:
            parts = {name: one[0] if isinstance(one, list) else one for name, one in input_dict.items()}
            codes = parts.pop("weight_packed" if "weight_packed" in parts else "weight")
            scheme = get_dense_scheme(self.hf_quantizer.compressor.quantization_config)
            name = str(full_layer_name).removesuffix(".weight")
            dtype = None if codes.dtype == torch.int32 else codes.dtype
            self.hf_quantizer.stored[name] = Stored(scheme.weights.num_bits, parts, dtype)
        else:
            scheme = self.scheme or get_experts_scheme(self.hf_quantizer.compressor.quantization_config)
            self.hf_quantizer.stored |= stored_experts(str(full_layer_name), input_dict, scheme.weights.num_bits)
        return super().convert(input_dict, source_patterns, target_patterns, full_layer_name, **kwargs)


class RepackingQuantizer(CompressedTensorsHfQuantizer):
    """Transformers' own quantizer, but what it loaded is saved packed again."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.stored = _Notes()
        self.recorded: dict[str, Any] = {}

    def get_load_operations(self) -> dict[str, Any]:
        """Return the operation that unpacks while loading, where the checkpoint or the caller asks for that."""
        return {"dequantize": _DequantizeAndNote}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        self.recorded = _recorded(checkpoint_files)
        return super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Leave a dense model as Transformers does, which still knows how it was stored if that was its own wish."""
        done = super().postprocess_model(model, **kwargs)
        if self.stored and self.recorded.get("dequantize"):
            model.hf_quantizer = self
            model.config.quantization_config = self.recorded
        return done

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return the state dict to save: packed as it was loaded, or dense where training has changed weights."""
        if self.recorded.get("format") not in FORMATS:
            return None, {}
        stored = self.stored | _unpacked_at_first_call(model)
        state = repacked_state(model, stored) if stored else None
        if state is not None:
            model.config.quantization_config = self.recorded
        elif self.quantization_config.dequantize and hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
            self.stored = _Notes()
        return state, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Make the model dense for good, in the dtype that it was loaded in."""
        if not self.quantization_config.dequantize:
            self.compressor.decompress_model(model)
        return model


def _recorded(checkpoint_files: list[str] | None) -> dict[str, Any]:
    """Return the quantization config as the checkpoint's file has it, without what the caller of Transformers set."""
    file = Path(checkpoint_files[0]).parent / "config.json" if checkpoint_files else None
    if file is None or not file.is_file():
        return {}
    recorded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {}
    return recorded if recorded.get("quant_method") == COMPRESSED_TENSORS else {}


def _unpacked_at_first_call(model: nn.Module) -> dict[str, Stored]:
    """Return how the modules that compressed-tensors has unpacked were stored, their zero points packed again."""
    from hfcompress.packed import pack_codes

    found = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        weight = module._parameters.get("weight")
        unpacked = weight is not None and weight.dtype not in (torch.int8, torch.float8_e4m3fn)
        if scheme is None or not unpacked or "weight_scale" not in module._parameters:
            continue
        parts = {part: getattr(module, part) for part in ("weight_scale", "weight_shape") if hasattr(module, part)}
        points = getattr(module, "weight_zero_point", None)
        if points is not None and not scheme.weights.symmetric:
            parts["weight_zero_point"] = pack_codes(points.T, scheme.weights.num_bits).T.contiguous()
        packed = scheme.format == "pack-quantized"
        one_by_one = torch.int8 if scheme.weights.type == "int" else torch.float8_e4m3fn
        found[name] = Stored(scheme.weights.num_bits, parts, None if packed else one_by_one)
    return found


def repacked_state(model: nn.Module, stored: dict[str, Stored]) -> dict[str, Tensor] | None:
    """Return the state dict with codes for the weights that were packed, or None, with a warning, if one was changed.

    stored: by module; modules that are gone since are passed over.
    """
    state: dict[str, Tensor] = with_split_experts(model, stored)
    packed: dict[str, Tensor] = {}
    unpacked: set[int] = set()
    for name, (bits, parts, dtype) in stored.items():
        weight = state.get(f"{name}.weight")
        if weight is None:
            continue
        words = _words(weight, parts, bits) if dtype is None else _codes(weight, parts["weight_scale"], dtype)
        if words is None:
            text = f"{name}.weight was changed since it was loaded, so the model is saved dense; quantize it again."
            warnings.warn(text, stacklevel=4)
            return None
        leaf = "weight_packed" if dtype is None else "weight"
        packed |= {f"{name}.{leaf}": words, **{f"{name}.{part}": one.data for part, one in parts.items()}}
        unpacked.add(weight.data_ptr())
    return {**{name: one for name, one in state.items() if one.data_ptr() not in unpacked}, **packed}


def _words(weight: Tensor, parts: dict[str, Tensor], bits: int) -> Tensor | None:
    """Return the packed codes of a weight that lies on its grid, None for any other.  weight: (rows, columns)."""
    from hfcompress.packed import pack_codes, unpack_codes
    from hfcompress.packed.packing import code_range

    rows, columns = weight.shape
    scale = parts["weight_scale"].to(weight.device).unsqueeze(-1)
    if len(scale) != rows or columns % scale.shape[1]:
        return None
    zero = torch.zeros((), device=weight.device)
    if "weight_zero_point" in parts:
        points = parts["weight_zero_point"].to(weight.device).T.contiguous()
        zero = unpack_codes(points, bits, rows).T.unsqueeze(-1).float()
    steps = weight.float().view(rows, scale.shape[1], -1) / scale.float()
    codes = torch.round(steps + zero).clamp_(*code_range(bits))
    values = ((codes - zero).to(scale.dtype) * scale).to(weight.dtype).view_as(weight)
    return pack_codes(codes.view_as(weight).to(torch.int8), bits) if torch.equal(values, weight) else None


def _codes(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the 8-bit codes of a weight that lies on its grid, None for any other.  weight: (out, in)."""
    scale = scale.to(weight.device)
    steps = weight.float() / scale.float()
    codes = (steps.round().clamp_(-128, 127) if dtype == torch.int8 else steps).to(dtype)
    values = (codes.to(scale.dtype) * scale).to(weight.dtype)
    return codes if torch.equal(values, weight) else None


def register() -> None:
    """Let the tables of Transformers hand out this quantizer for compressed-tensors checkpoints."""
    auto.AUTO_QUANTIZER_MAPPING[COMPRESSED_TENSORS] = RepackingQuantizer
