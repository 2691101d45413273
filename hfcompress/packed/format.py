"""The ``quantization_config`` that tells stock Transformers how to read packed layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import ModelError
from hfcompress.packed.experts import routers
from hfcompress.packed.linear import PACKABLE, PackedConv1D, PackedLinear
from hfcompress.packed.weight import PackedWeight

FORMAT = "pack-quantized"
_CLASS_TARGETS: dict[type[PackedWeight], str] = {PackedLinear: "Linear", PackedConv1D: "Conv1D"}


class Scheme(NamedTuple):
    """How a matrix is stored.  group_size: columns that share a scale; None is one scale per row."""

    bits: int
    group_size: int | None
    symmetric: bool = True


def packed_layers(model: nn.Module) -> dict[str, PackedWeight]:
    """Return the packed layers of a model by name; one that stands in two places appears under both."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, PackedWeight)}


def schemes_of(model: nn.Module) -> dict[Scheme, list[str]]:
    """Return the distinct schemes of a model's packed layers, each with the layers' names."""
    found: dict[Scheme, list[str]] = {}
    for name, module in packed_layers(model).items():
        found.setdefault(Scheme(module.bits, module.group_size, module.symmetric), []).append(name)
    return found


def is_seq2seq(model: nn.Module) -> bool:
    """Tell whether a model has an encoder, which ``generate`` calls by itself, beside a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def stock_reads_at_first_call(model: nn.Module) -> bool:
    """Tell whether stock Transformers, told to unpack a model at its first call, finds what it expects.

    That comes too late for an encoder-decoder, whose encoder ``generate`` calls alone, and it knows neither zero
    points nor other layers than linear ones.
    """
    layers = packed_layers(model).values()
    return not is_seq2seq(model) and all(type(one) is PackedLinear and one.symmetric for one in layers)


def compressed_tensors_config(model: nn.Module) -> dict[str, Any]:
    """Describe a model's packed layers as compressed-tensors reads it.

    One config group per distinct scheme. With one scheme the target is every ``Linear`` but those in ``ignore``; with
    several, each group names its layers. Raises ModelError when nothing is packed.
    """
    packed = packed_layers(model)
    if not packed:
        raise ModelError(f"{type(model).__name__} has no packed linear layer, so it has no quantization config.")
    by_scheme = schemes_of(model)
    dense = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, PACKABLE)]
    groups = {}
    for index, (scheme, names) in enumerate(by_scheme.items()):
        others = [name for name in (*packed, *dense) if name not in set(names)]
        targets = _name_patterns(names, others) if len(by_scheme) > 1 else _class_targets(packed, dense)
        groups[f"group_{index}"] = _config_group(scheme, targets)
    ignored = [name for name in dense if isinstance(model.get_submodule(name), (nn.Linear, Conv1D))]
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dict.fromkeys((*ignored, *routers(model)))),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    if len(by_scheme) == 1:
        # Stock Transformers then unpacks the model while loading it, by the first scheme whatever the targets say.
        # Otherwise it unpacks at the first call and, saved again, would write a mixture of both.
        config["dequantize"] = True
    return config


def _class_targets(packed: dict[str, PackedWeight], dense: Sequence[str]) -> list[str]:
    """Return the targets of the only scheme: classes whose dense layers are ignored by name, and names of others."""
    classes = dict.fromkeys(_CLASS_TARGETS[type(one)] for one in packed.values() if type(one) in _CLASS_TARGETS)
    by_name = [name for name, module in packed.items() if type(module) not in _CLASS_TARGETS]
    return [*classes, *_name_patterns(by_name, [*(packed.keys() - set(by_name)), *dense])]


def _config_group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "format": FORMAT,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }


def _name_patterns(names: Sequence[str], others: Sequence[str]) -> list[str]:
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
