"""Say new head counts and widths in a model's config, where the config can say them: proven by building from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.structure.resize import Edits
from hfcompress.structure.shapes import meta_twin

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


@dataclass(frozen=True)
class Resized:
    """What became of one site.  weight: name of the tensor that reads its units.  old, new: its size or sizes."""

    weight: str
    old: tuple[int, ...]
    new: tuple[int, ...]


def say_widths_(model: PreTrainedModel, edits: Edits, blocks: Sequence[Resized]) -> dict[str, int]:
    """Write new feed-forward widths, ``(width,)``, where a config key says all that it governs."""
    writer = _Writer(model, edits)
    olds = {block.old[0] for block in blocks}
    for path, config in _configs(model.config):
        for key, value in list(vars(config).items()):
            unset = value is None and any(part in key for part in WIDTH_NAMES)
            if unset or (isinstance(value, int) and not isinstance(value, bool) and value in olds):
                old = None if unset else (value,)
                writer.say({(path, key): 0}, {}, [block for block in blocks if old in (None, block.old)])
    return writer.said


def say_heads_(model: PreTrainedModel, edits: Edits, sites: Sequence[Resized], head_dim: int) -> dict[str, int]:
    """Write new head counts, ``(query, key/value)``, where config keys say all that they govern.

    The head size is written too if the config otherwise derives it from the head count.
    """
    writer = _Writer(model, edits)
    for path, config in _configs(model.config):
        for part in ("encoder", "decoder", ""):
            for old in sorted({site.old for site in sites}):
                keys = {(path, key): is_kv for key, is_kv in _head_keys(config, part, old).items()}
                same = [site for site in sites if site.old == old]
                if keys and not writer.say(keys, {}, same):
                    writer.say(keys, {(path, "head_dim"): head_dim}, same)
    return writer.said


class _Writer:
    """Writes config values after building the model that they describe, on the meta device."""

    def __init__(self, model: PreTrainedModel, edits: Edits) -> None:
        self.model, self.edits = model, edits
        self.actual, self.built = shapes_of(model), _built(model, {})
        self.said: dict[str, int] = {}

    def say(self, keys: Mapping[Key, int], fixed: Mapping[Key, int], sites: Sequence[Resized]) -> bool:
        """Set each key to the new size with its index, if all that the keys govern is then as it is in the model."""
        tried: set[tuple[int, ...]] = set()
        for new in [site.new for site in sites if site.new != site.old]:
            built = self._try(keys, fixed, new) if new not in tried else None
            tried.add(new)
            if built is None:
                continue
            # What the keys govern does not depend on the value tried, and must have become the same everywhere.
            governed = self._governed(built)
            sizes = {site.new for site in sites if site.weight in governed}
            if len(sizes) != 1:
                return False
            (size,) = sizes
            built = built if size == new else self._try(keys, fixed, size)
            return built is not None and self._write(built, keys, fixed, size)
        return False

    def _try(self, keys: Mapping[Key, int], fixed: Mapping[Key, int], new: tuple[int, ...]) -> Shapes | None:
        return _built(self.model, {**{key: new[index] for key, index in keys.items()}, **fixed})

    def _governed(self, built: Shapes) -> list[str]:
        return [name for name in built if self.built is not None and built[name] != self.built.get(name)]

    def _write(self, built: Shapes, keys: Mapping[Key, int], fixed: Mapping[Key, int], new: tuple[int, ...]) -> bool:
        governed = self._governed(built)
        if not governed or any(built[name] != self.actual.get(name) for name in governed):
            return False
        for (path, key), value in {**{key: new[index] for key, index in keys.items()}, **fixed}.items():
            self.edits.set(_at(self.model.config, path), key, value)
            self.said[f"{path}.{key}" if path else key] = value
        self.built = built
        return True


def _head_keys(config: PreTrainedConfig, part: str, old: tuple[int, ...]) -> dict[str, bool]:
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
        # What save_pretrained will ask: a class's own rules are not checked when a value is set.
        if hasattr(config, "validate"):
            config.validate()
        return shapes_of(meta_twin(model, config))
    except Exception:  # each architecture refuses in its own way what it cannot express
        return None
