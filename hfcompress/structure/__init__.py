"""Where the layers of a model live, and changing how many there are."""

from __future__ import annotations

from hfcompress.structure.layers import DropLayers, drop_layers, find_stack
from hfcompress.structure.stack import LINEAR_TYPES, LayerStack, layer_stacks, linear_weights_of, stack_linears

__all__ = [
    "LINEAR_TYPES",
    "DropLayers",
    "LayerStack",
    "drop_layers",
    "find_stack",
    "layer_stacks",
    "linear_weights_of",
    "stack_linears",
]
