"""Where heads, neurons and layers of a model live, found by running it once, and changing how many there are."""

from __future__ import annotations

from hfcompress.structure.attention import find_attention
from hfcompress.structure.ffn import find_ffn
from hfcompress.structure.layers import DropLayers, drop_layers
from hfcompress.structure.sites import AttentionSite, FfnSite, Part
from hfcompress.structure.stack import LINEAR_TYPES, LayerStack, layer_stacks, linear_weights_of, stack_linears

__all__ = [
    "LINEAR_TYPES",
    "AttentionSite",
    "DropLayers",
    "FfnSite",
    "LayerStack",
    "Part",
    "drop_layers",
    "find_attention",
    "find_ffn",
    "layer_stacks",
    "linear_weights_of",
    "stack_linears",
]
