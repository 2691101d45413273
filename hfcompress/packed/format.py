"""The ``quantization_config`` that tells stock Transformers how to read packed linear layers."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from hfcompress.errors import ModelError
from hfcompress.packed.linear import PackedLinear

FORMAT = "pack-quantized"
Scheme = tuple[int, int | None]


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Return the packed linear layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def compressed_tensors_config(model: nn.Module) -> dict[str, Any]:
    """Describe a model's packed linear layers as compressed-tensors reads it.

    One config group per distinct (bits, group_size). With one scheme the target is every ``Linear`` but those in
    ``ignore``; with several, each group names its layers. Raises ModelError when nothing is packed.
    """
    packed = packed_linears(model)
    if not packed:
        raise ModelError(f"{type(model).__name__} has no packed linear layer, so it has no quantization config.")
    by_scheme: dict[Scheme, list[str]] = {}
    for name, module in packed.items():
        by_scheme.setdefault((module.bits, module.group_size), []).append(name)
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups = {}
    for index, (scheme, names) in enumerate(by_scheme.items()):
        others = [name for name in (*packed, *dense) if name not in set(names)]
        targets = ["Linear"] if len(by_scheme) == 1 else _name_patterns(names, others)
        groups[f"group_{index}"] = _config_group(scheme, targets)
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if encoder_decoder and len(by_scheme) == 1:
        # Stock Transformers unpacks at the first call of the whole model, but generate() calls the encoder alone; and
        # T5 reads weights while it loads. Unpacking at load serves both, but reads every layer by the first scheme.
        config["dequantize"] = True
    return config


def _config_group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    bits, group_size = scheme
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "format": FORMAT,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }


def _name_patterns(names: list[str], others: list[str]) -> list[str]:
    """Return ``re:`` targets that match these names and none of the others, one for all layers where that is true."""
    patterns: list[str] = []
    for name in names:
        literal = re.escape(name)
        over_layers = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", literal)
        clashes = any(re.fullmatch(over_layers, other) for other in others)
        pattern = f"re:^{literal if clashes else over_layers}$"
        if pattern not in patterns:
            patterns.append(pattern)
    return patterns
