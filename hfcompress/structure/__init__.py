"""Where heads, neurons and layers of a model live, found by running it once, and changing how many there are."""

from __future__ import annotations

from hfcompress.structure.attention import find_attention
from hfcompress.structure.ffn import find_ffn
from hfcompress.structure.gates import Gate, Gates, attach_gates
from hfcompress.structure.layers import DropLayers, drop_layers, find_stack
from hfcompress.structure.plan import Kept, plan_heads, plan_neurons
from hfcompress.structure.shrink import ShrinkReport, shrink
from hfcompress.structure.sites import AttentionSite, FfnSite, Part
from hfcompress.structure.stack import LINEAR_TYPES, LayerStack, layer_stacks, linear_weights_of, stack_linears
from hfcompress.structure.zeros import closed_heads, closed_neurons, closed_units, zero_heads_, zero_neurons_

__all__ = [
    "LINEAR_TYPES",
    "AttentionSite",
    "DropLayers",
    "FfnSite",
    "Gate",
    "Gates",
    "Kept",
    "LayerStack",
    "Part",
    "ShrinkReport",
    "attach_gates",
    "closed_heads",
    "closed_neurons",
    "closed_units",
    "drop_layers",
    "find_attention",
    "find_ffn",
    "find_stack",
    "layer_stacks",
    "linear_weights_of",
    "plan_heads",
    "plan_neurons",
    "shrink",
    "stack_linears",
    "zero_heads_",
    "zero_neurons_",
]
