"""Depth pruning: keep some layers of a stack, drop the others, and say so in the config."""

from __future__ import annotations

import copy
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.errors import ModelError
from hfcompress.structure.stack import LayerStack, layer_stacks


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DropLayers:
    """Keep ``keep`` layers of the model's stack.

    select: ``even`` keeps the first and the last layer and evenly spaced ones between; ``first`` keeps the first
    ``keep`` layers; ``last`` the last ones.  layers: the indices to keep, instead of keep and select.
    """

    keep: Annotated[int, Field(ge=1)] | None = None
    select: Literal["even", "first", "last"] = "even"
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.layers is None):
            raise ValueError("give either keep (how many layers) or layers (which ones)")
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers must be distinct indices in rising order")


def layers_to_keep(total: int, method: DropLayers) -> list[int]:
    """Return the indices that stay, in rising order.  Raises ModelError when the stack has not that many."""
    if method.layers is not None:
        beyond = [index for index in method.layers if index >= total]
        if beyond:
            raise ModelError(f"layers={list(method.layers)}: the stack has layers 0 to {total - 1}, no {beyond}.")
        return list(method.layers)
    assert method.keep is not None
    if method.keep > total:
        raise ModelError(f"keep={method.keep}: the stack has only {total} layers.")
    if method.select == "first":
        return list(range(method.keep))
    if method.select == "last":
        return list(range(total - method.keep, total))
    if method.keep == 1:
        return [0]
    return [round(place * (total - 1) / (method.keep - 1)) for place in range(method.keep)]


def drop_layers(model: PreTrainedModel, method: DropLayers) -> list[int]:
    """Remove layers from the model's stack in place and return the indices that stayed.

    The config is changed with the modules (layer count, per-layer lists, cache indices), so that the model reloads
    with plain ``from_pretrained``.  Raises ModelError, before anything changed, for a model with several stacks,
    whose config cannot say how many layers there are, or whose layers cannot stand where they would come to stand.
    """
    stacks = layer_stacks(model)
    if len(stacks) != 1:
        names = ", ".join(f"{stack.name} ({len(stack)})" for stack in stacks)
        raise ModelError(f"{type(model).__name__} has {len(stacks)} layer stacks ({names}); drop_layers takes one.")
    stack = stacks[0]
    total = len(stack)
    kept = layers_to_keep(total, method)
    config = model.config.get_text_config()
    if getattr(config, "num_hidden_layers", None) != total:
        raise ModelError(
            f"The stack {stack.name} has {total} layers but the config's num_hidden_layers is "
            f"{getattr(config, 'num_hidden_layers', None)}; a shorter model could not be reloaded."
        )
    _refuse_unlike_places(model, stack, kept)
    _shorten_(config, total, kept)
    layers = nn.ModuleList(stack.layers[index] for index in kept)
    parent, _, name = stack.name.rpartition(".")
    setattr(model.get_submodule(parent), name, layers)
    for new, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = new  # type: ignore[assignment]
    return kept


def _refuse_unlike_places(model: PreTrainedModel, stack: LayerStack, kept: list[int]) -> None:
    """Compare each kept layer's tensor names with those of the layer that a reload will build in its place."""
    config = copy.deepcopy(model.config)
    _shorten_(config.get_text_config(), len(stack), kept)
    with torch.device("meta"):
        places = type(model)(config).get_submodule(stack.name)
    for new, old in enumerate(kept):
        differing = set(places.get_submodule(str(new)).state_dict()) ^ set(stack.layers[old].state_dict())
        if differing:
            raise ModelError(
                f"In {type(model).__name__}, layer {old} cannot become layer {new}: only one of the two has "
                f"{', '.join(sorted(differing))}. Keep layer {new} itself."
            )


def _shorten_(config: PreTrainedConfig, total: int, kept: list[int]) -> None:
    """Set the layer count and shorten the lists with one entry per layer, such as ``layer_types``."""
    for name, value in list(vars(config).items()):
        # By name too: a list of three end-of-text tokens says nothing of a model's three layers.
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == total:
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
