"""Find the attention heads of a model by running it once, not by a table of architectures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.errors import ModelError
from hfcompress.structure.influence import acts_on
from hfcompress.structure.probe import AttentionCall, LinearCall, Trace, trace_model
from hfcompress.structure.sites import AttentionSite, Part, layer_of, only_source, part_of


def find_attention(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> list[AttentionSite]:
    """Return every attention of the model, in the order in which it runs.

    inputs: arguments of one forward; made from the config by default.  Which rows and columns belong to which head is
    read off gradients between the linear layers and the attention function, so fused, interleaved and transposed
    projections need no rule.  The model is left as it was.

    Raises ModelError when no attention runs through Transformers' attention interface, or when one has heads that
    cannot be cut apart (a norm over all heads before attention, heads that share features).
    """
    return attention_in(model, trace_model(model, inputs))


def attention_in(model: PreTrainedModel, trace: Trace) -> list[AttentionSite]:
    """Return every attention that a trace of the model saw; see ``find_attention``."""
    if not trace.attentions:
        raise ModelError(
            f"{type(model).__name__} runs no attention through Transformers' attention interface, so its heads cannot "
            "be found; prune weights, neurons or layers instead."
        )
    names = {module: name for name, module in model.named_modules()}
    sites: dict[str, AttentionSite] = {}
    bias_owner: dict[int, str] = {}
    for call in trace.attentions:
        name = names[call.module]
        if name in sites:  # layers that share their modules, as ALBERT's do
            continue
        owners = [bias_owner.setdefault(id(bias), name) for bias in call.biases]
        owner = next((one for one in owners if one != name), None)
        sites[name] = _site(model, trace, call, name, owner)
    return list(sites.values())


def _site(model: PreTrainedModel, trace: Trace, call: AttentionCall, name: str, owner: str | None) -> AttentionSite:
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    if heads % max(1, kv_heads):
        raise ModelError(f"{name} has {heads} query heads for {kv_heads} key/value heads; they do not divide.")
    query = _producer(trace, call.query, heads, f"The queries of {name}")
    key = _producer(trace, call.key, kv_heads, f"The keys of {name}")
    value = _producer(trace, call.value, kv_heads, f"The values of {name}")
    learned = [bias for bias in call.biases if owner is None and trace.sources_of(bias)]
    extra = tuple(_producer(trace, one, heads, f"The position scores of {name}") for one in (*call.extra, *learned))
    output, column_of = _reader(trace, call, name)
    columns = torch.argsort(column_of).reshape(heads, len(column_of) // max(1, heads))
    config = getattr(call.module, "config", None)
    reads = sorted(trace.config_reads.get(call.module, ()))
    counts = tuple(one for one in reads if "head" in one and getattr(config, one, None) in (heads, kv_heads))
    return AttentionSite(
        name=name,
        layer=layer_of(model, name),
        query=query,
        key=key,
        value=value,
        output=Part(output.name, columns),
        extra=extra,
        cached=_is_cached(trace, call.key),
        same_heads_as=owner,
        config_counts=tuple(one for one in counts if not one.endswith("dim")),
    )


def _producer(trace: Trace, tensor: Tensor, heads: int, what: str) -> Part:
    """Return which output features of which module each head in dimension 1 of a tensor is made of."""
    source = only_source(trace.sources_of(tensor), what)
    others = [call.name if call else "the output" for call in trace.listeners.get(id(source.leaf), [])]
    if others:
        raise ModelError(f"{what} come from {source.name}, which {others[0]} reads too; its heads cannot be cut.")
    units = torch.arange(heads).reshape(1, heads, 1, 1)
    return part_of(source.name, acts_on(tensor, units, source.leaf), heads, "heads")


def _reader(trace: Trace, call: AttentionCall, name: str) -> tuple[LinearCall, Tensor]:
    """Return the linear call that reads the attention's output, and its column for each (head, feature), flat."""
    found = trace.listeners.get(id(call.leaf), [])
    reader = found[0] if len(found) == 1 else None
    if reader is None or trace.sources_of(reader.inputs) or isinstance(reader.module, nn.Embedding):
        readers = ", ".join(one.name if one else "the output" for one in found) or "nothing"
        raise ModelError(
            f"The output of {name} is read by {readers}; one linear layer that reads the heads and nothing else is "
            "needed to cut them."
        )
    width = reader.inputs.shape[-1]
    columns = acts_on(reader.inputs, torch.arange(width), call.leaf, feature_dims=2)
    if not torch.equal(columns.sort().values, torch.arange(width)):
        raise ModelError(f"The heads of {name} are mixed before {reader.name} reads them; they cannot be cut apart.")
    return reader, columns


def _is_cached(trace: Trace, key: Tensor) -> bool:
    """Say whether a cache holds these keys (or, for a sliding window, the last of them)."""
    storage = key.untyped_storage().data_ptr()
    kept = [getattr(layer, "keys", None) for cache in trace.caches for layer in cache.layers]
    return any(keys is not None and keys.untyped_storage().data_ptr() == storage for keys in kept)
