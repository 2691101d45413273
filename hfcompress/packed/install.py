"""Put empty packed layers where a checkpoint's quantization config says that they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.packed.format import FORMAT
from hfcompress.packed.linear import PACKABLE, packed_twin
from hfcompress.packed.packing import PACKABLE_BITS

NamesOf = Callable[[str], Iterable[str]]
_CLASSES: dict[str, type[nn.Module]] = {"Linear": nn.Linear, "Conv1D": Conv1D}


def is_packable(config: Mapping[str, Any]) -> bool:
    """Tell whether ``PackedWeight`` holds what this compressed-tensors config describes: weights of whole numbers."""
    groups = config.get("config_groups", {}).values()
    return config.get("quant_method") == "compressed-tensors" and config.get("format") == FORMAT and all(
        not group.get("input_activations")
        and group["weights"]["type"] == "int"
        and group["weights"]["num_bits"] in PACKABLE_BITS
        for group in groups
    )  # fmt: skip


def install_packed_(model: nn.Module, config: Mapping[str, Any], names_of: NamesOf) -> list[str]:
    """Replace the layers that a packable config names by empty packed ones, and return their names.

    names_of: the names that the config may have for a module, which differ between a model with and without a head.
    """
    placed = []
    for name, module in list(model.named_modules()):
        weights = _weights_for(config, tuple(names_of(name)), module)
        if weights is not None:
            packed = packed_twin(module, weights["num_bits"], weights["group_size"], weights["symmetric"])
            model.set_submodule(name, packed)
            placed.append(name)
    return placed


def _weights_for(config: Mapping[str, Any], names: tuple[str, ...], module: nn.Module) -> Mapping[str, Any] | None:
    """Return the scheme of a layer that the config knows by one of these names, None for a dense one."""
    if not isinstance(module, PACKABLE) or any(n in config.get("ignore", ()) for n in names):
        return None
    for group in config["config_groups"].values():
        for target in group["targets"]:
            kind = _CLASSES.get(target)
            if isinstance(module, kind) if kind else any(_is_target(target, name) for name in names):
                weights: Mapping[str, Any] = group["weights"]
                return weights
    return None


def _is_target(target: str, name: str) -> bool:
    return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name
