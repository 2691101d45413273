"""The layer stacks of a model, found from its modules and not from a table of architectures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import ModelError
from hfcompress.packed.weight import PackedWeight

LINEAR_TYPES = (nn.Linear, Conv1D)
WEIGHT_TYPES = (*LINEAR_TYPES, PackedWeight)  # packed ones can be watched, not cut


@dataclass(frozen=True)
class LayerStack:
    """A list of alike blocks that the model runs one after another."""

    name: str
    layers: nn.ModuleList

    def __len__(self) -> int:
        return len(self.layers)


def linear_weights_of(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the linear (and Conv1D) modules below a module by name, in the order of definition."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, LINEAR_TYPES)}


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        return False
    return all(type(layer) is type(module[0]) and _has_linear(layer) for layer in module)


def _has_linear(layer: nn.Module) -> bool:
    return any(isinstance(module, WEIGHT_TYPES) for module in layer.modules())


def layer_stacks(model: nn.Module) -> list[LayerStack]:
    """Return the outermost lists of alike blocks that hold linear layers; encoder-decoders have two.

    Raises ModelError when the model has none.
    """
    stacks: list[LayerStack] = []
    for name, module in model.named_modules():
        inside_another = any(name.startswith(stack.name + ".") for stack in stacks)
        if not inside_another and _is_stack(module):
            stacks.append(LayerStack(name, module))
    if not stacks:
        raise ModelError(
            f"{type(model).__name__} has no stack of alike layers (a ModuleList of blocks with linear layers), "
            "so there is nothing inside it that hfcompress knows how to compress."
        )
    return stacks


def stack_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear (and Conv1D) module inside the layer stacks by its full name."""
    return {
        f"{stack.name}.{index}.{name}": module
        for stack in layer_stacks(model)
        for index, layer in enumerate(stack.layers)
        for name, module in linear_weights_of(layer).items()
    }
