"""Put empty packed layers where a checkpoint's quantization config says that they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from hfcompress.packed.format import FORMAT
from hfcompress.packed.linear import PackedLinear
from hfcompress.packed.packing import PACKABLE_BITS

NamesOf = Callable[[str], Iterable[str]]


def is_packable(config: Mapping[str, Any]) -> bool:
    """Tell whether ``PackedLinear`` holds what this compressed-tensors config describes: symmetric integer weights."""
    groups = config.get("config_groups", {}).values()
    return config.get("quant_method") == "compressed-tensors" and config.get("format") == FORMAT and all(
        not group.get("input_activations")
        and group["weights"]["type"] == "int"
        and group["weights"]["symmetric"]
        and group["weights"]["num_bits"] in PACKABLE_BITS
        for group in groups
    )  # fmt: skip


def install_packed_(model: nn.Module, config: Mapping[str, Any], names_of: NamesOf) -> list[str]:
    """Replace the linear layers that a packable config names by empty packed ones, and return their names.

    names_of: the names that the config may have for a module, which differ between a model with and without a head.
    """
    placed = []
    for name, module in list(model.named_modules()):
        weights = _weights_for(config, tuple(names_of(name))) if isinstance(module, nn.Linear) else None
        if weights is None or not isinstance(module, nn.Linear):
            continue
        packed = PackedLinear(
            module.in_features,
            module.out_features,
            weights["num_bits"],
            weights["group_size"],
            bias=module.bias is not None,
            dtype=module.weight.dtype,
            device=module.weight.device,
        )
        model.set_submodule(name, packed)
        placed.append(name)
    return placed


def _weights_for(config: Mapping[str, Any], names: tuple[str, ...]) -> Mapping[str, Any] | None:
    """Return the scheme of a linear layer that the config knows by one of these names, None for a dense one."""
    if any(name in config.get("ignore", ()) for name in names):
        return None
    for group in config["config_groups"].values():
        if any(target == "Linear" or any(_is_target(target, name) for name in names) for target in group["targets"]):
            weights: Mapping[str, Any] = group["weights"]
            return weights
    return None


def _is_target(target: str, name: str) -> bool:
    return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name
