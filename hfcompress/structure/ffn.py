"""Find the feed-forward neurons of a model by running it once, not by a table of architectures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hfcompress.errors import ModelError
from hfcompress.structure.influence import acts_on
from hfcompress.structure.probe import LinearCall, Trace, trace_model
from hfcompress.structure.sites import FfnSite, Part, layer_of, part_of
from hfcompress.structure.stack import WEIGHT_TYPES


def find_ffn(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> list[FfnSite]:
    """Return every feed-forward block of the model's layers, in the order in which it runs.

    inputs: arguments of one forward; made from the config by default.  A block is a linear layer each of whose input
    columns depends on the same one row of each of one or more other linear layers of its layer, which nothing else
    reads: shown by gradients, so gated, fused and plain blocks need no rule.  The model is left as it was.

    Raises ModelError when there is none.
    """
    return ffn_in(model, trace_model(model, inputs))


def ffn_in(model: PreTrainedModel, trace: Trace) -> list[FfnSite]:
    """Return every feed-forward block that a trace of the model saw; see ``find_ffn``."""
    sites: dict[str, FfnSite] = {}
    reasons: list[str] = []
    for call in trace.linears:
        ups = _ups(model, trace, call)
        if call.name in sites or not ups:
            continue
        try:
            sites[call.name] = _site(model, call, ups)
        except ModelError as error:
            reasons.append(str(error))
    if not sites:
        why = f" Seen: {reasons[0]}" if reasons else ""
        raise ModelError(
            f"{type(model).__name__} has no feed-forward block of linear layers that could be cut by neurons.{why}"
        )
    return list(sites.values())


def _ups(model: PreTrainedModel, trace: Trace, down: LinearCall) -> list[LinearCall]:
    """Return the linear calls of the same layer that feed ``down`` and nothing else; none if anything else does."""
    layer = layer_of(model, down.name)
    sources = trace.sources_of(down.inputs) if layer is not None and isinstance(down.module, WEIGHT_TYPES) else []
    for source in sources:
        alone = [one.name if one else None for one in trace.listeners[id(source.leaf)]] == [down.name]
        if not alone or not isinstance(source.module, WEIGHT_TYPES) or layer_of(model, source.name) != layer:
            return []
    return sources


def _site(model: PreTrainedModel, down: LinearCall, ups: list[LinearCall]) -> FfnSite:
    width = down.inputs.shape[-1]
    columns = torch.arange(width)
    parts = tuple(part_of(up.name, acts_on(down.inputs, columns, up.leaf), width, "neurons") for up in ups)
    layer = layer_of(model, down.name)
    assert layer is not None
    return FfnSite(down.name, layer, parts, Part(down.name, columns[:, None]))
