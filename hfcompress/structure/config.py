"""Say new head counts and widths in a model's config, where the config can say them: proven by building from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.structure.resize import Edits

Shapes = dict[str, Any]
Key = tuple[str, str]
WIDTH_NAMES = ("inner", "intermediate", "ffn", "d_ff", "hidden_dim", "mlp")


def shapes_of(model: nn.Module) -> Shapes:
    """Return every tensor's shape and every integer attribute of every module, by name."""
    shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, int) and not isinstance(value, bool) and not attribute.startswith("_"):
                shapes[f"{name}:{attribute}"] = value
    return shapes


def differences(model: PreTrainedModel) -> list[str]:
    """Return the names of tensors and attributes whose size is not what the model's config says."""
    actual, built = shapes_of(model), _built(model, {})
    return sorted(name for name in actual if built is not None and built.get(name) != actual[name])


def say_widths_(model: PreTrainedModel, edits: Edits, widths: Mapping[int, set[int]]) -> dict[str, int]:
    """Write new feed-forward widths where a config key says all that it governs.  widths: new ones by the old one."""
    said: dict[str, int] = {}
    for path, config in _configs(model.config):
        for key, value in list(vars(config).items()):
            unset = value is None and any(part in key for part in WIDTH_NAMES)
            known = widths.get(value, set()) if isinstance(value, int) and not isinstance(value, bool) else set()
            for new in sorted(set().union(*widths.values()) if unset else known):
                said |= _say(model, edits, {(path, key): new})
    return said


def say_heads_(
    model: PreTrainedModel, edits: Edits, counts: Mapping[tuple[int, int], set[tuple[int, int]]], head_dim: int
) -> dict[str, int]:
    """Write new head counts where config keys say all that they govern.

    counts: new (query, key/value) head counts by the old ones.  The head size is written too if nothing else holds it.
    """
    said: dict[str, int] = {}
    for path, config in _configs(model.config):
        for part in ("encoder", "decoder", ""):
            for old, news in counts.items():
                keys = _head_keys(config, part, old)
                for new in sorted(news):
                    changes = {(path, key): new[is_kv] for key, is_kv in keys.items()}
                    for more in ({}, {(path, "head_dim"): head_dim}) if changes else ():
                        said |= _say(model, edits, changes | more)
    return said


def _head_keys(config: PreTrainedConfig, part: str, old: tuple[int, int]) -> dict[str, bool]:
    """Return the config's head count keys with these values, and whether each counts key/value heads."""
    keys = {}
    for key, value in vars(config).items():
        of_part = key.startswith(part) if part else not key.startswith(("encoder", "decoder"))
        is_kv = "key_value" in key or "kv" in key
        if of_part and "head" in key and "dim" not in key and value == old[is_kv] and not isinstance(value, bool):
            keys[key] = is_kv
    return keys


def _configs(config: PreTrainedConfig, path: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield a config and those inside it with their dotted paths."""
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value, f"{path}.{name}" if path else name)


def _at(config: PreTrainedConfig, path: str) -> PreTrainedConfig:
    for name in path.split(".") if path else ():
        config = getattr(config, name)
    return config


def _built(model: PreTrainedModel, changes: Mapping[Key, int]) -> Shapes | None:
    """Return the shapes of a model built from the config with changes; None if the config refuses them."""
    try:
        config = copy.deepcopy(model.config)
        for (path, key), value in changes.items():
            setattr(_at(config, path), key, value)
        with torch.device("meta"):
            return shapes_of(type(model)(config))
    except Exception:  # each architecture refuses in its own way what it cannot express
        return None


def _say(model: PreTrainedModel, edits: Edits, changes: Mapping[Key, int]) -> dict[str, int]:
    """Write the changes if everything that they govern is then as it is in the model; return what was written."""
    actual, before, after = shapes_of(model), _built(model, {}), _built(model, changes)
    if before is None or after is None:
        return {}
    governed = [name for name in after if after[name] != before.get(name)]
    if not governed or any(after[name] != actual.get(name) for name in governed):
        return {}
    for (path, key), value in changes.items():
        edits.set(_at(model.config, path), key, value)
    return {f"{path}.{key}" if path else key: value for (path, key), value in changes.items()}
