"""How a config says how many layers a stack has; proven by building the model from it without weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.errors import ModelError
from hfcompress.structure.stack import LayerStack, layer_stacks


@dataclass(frozen=True)
class LayerCount:
    """The field that holds a stack's layer count: its name, and the way from the model's config to its config."""

    path: tuple[str, ...]
    name: str

    def shorten_(self, config: PreTrainedConfig, total: int, kept: Sequence[int]) -> None:
        """Set the layer count and shorten the lists with one entry per layer, such as ``layer_types``."""
        for step in self.path:
            config = getattr(config, step)
        for name, value in list(vars(config).items()):
            # By name too: a list of three end-of-text tokens says nothing of a model's three layers.
            if "layer" in name and isinstance(value, (list, tuple)) and len(value) == total:
                setattr(config, name, [value[index] for index in kept])
        setattr(config, self.name, len(kept))
        _renumber_stages_(config, total, kept)


def _renumber_stages_(config: Any, total: int, kept: Sequence[int]) -> None:
    """Count a backbone's stages anew, one per layer after the stem.

    The last one, given out unless others are asked for, is then the new last one.  A config that gives out another
    stage, which goes, is left with it, and cannot be reloaded.
    """
    stages = getattr(config, "stage_names", None)
    if not stages or len(stages) != total + 1:
        return
    names = stages[: len(kept) + 1]
    renamed = dict(zip([stages[0], *(stages[index + 1] for index in kept)], names))
    given = names[-1:] if config.out_features == stages[-1:] else [renamed.get(one) for one in config.out_features]
    if None not in given:
        config.stage_names = names
        config.out_features = given


def skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model's class from a config, without memory for weights."""
    with torch.device("meta"):
        return type(model)(config)


def layer_count_of(model: PreTrainedModel, stack: LayerStack, kept: Sequence[int]) -> LayerCount:
    """Find the field that makes this stack, and no other, as long as ``kept``.

    Raises ModelError when no field of the config does.
    """
    lengths = {one.name: len(one) for one in layer_stacks(model)}
    wanted = {**lengths, stack.name: len(kept)}
    for path, config in _configs(model.config, ()):
        for name, value in vars(config).items():
            if "layer" not in name or type(value) is not int or value != len(stack):
                continue
            field = LayerCount(path, name)
            shorter = copy.deepcopy(model.config)
            field.shorten_(shorter, len(stack), kept)
            if {one.name: len(one) for one in layer_stacks(skeleton(model, shorter))} == wanted:
                return field
    stated = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    raise ModelError(
        f"The stack {stack.name} has {len(stack)} layers but the config's num_hidden_layers is {stated}, and no other "
        "field says how many there are; a shorter model could not be reloaded."
    )


def _configs(config: PreTrainedConfig, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value, (*path, name))


def follow_(model: PreTrainedModel, longer: PreTrainedModel, shorter: PreTrainedModel) -> None:
    """Change the configs that parts of a model keep for themselves (T5's decoder) as they are in ``shorter``.

    longer: a model built from the config as it was; only what differs from it is changed.
    """
    parts = dict(shorter.named_modules())
    for name, before in longer.named_modules():
        config, new = getattr(before, "config", None), getattr(parts.get(name), "config", None)
        own = getattr(model.get_submodule(name), "config", None) if name in parts else None
        if not isinstance(config, PreTrainedConfig) or new is None or own is None or own is model.config:
            continue
        for field, value in vars(new).items():
            if not isinstance(value, PreTrainedConfig) and value != vars(config).get(field):
                setattr(own, field, copy.deepcopy(value))
