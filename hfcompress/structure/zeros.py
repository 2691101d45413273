"""Closed heads and neurons as zeros in the weights: a plain checkpoint says by itself what was closed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hfcompress.structure.resize import input_dim, output_dim, weight_of
from hfcompress.structure.sites import AttentionSite, FfnSite, Part, units_of


def closed_heads(model: nn.Module, site: AttentionSite) -> Tensor:
    """Return which query heads have no effect, (heads,) bool: their columns of the output projection are all zero."""
    return closed_units(model, site.output)


def closed_neurons(model: nn.Module, site: FfnSite) -> Tensor:
    """Return which neurons have no effect, (width,) bool: their column of ``down`` is all zero."""
    return closed_units(model, site.down)


@torch.no_grad()
def zero_heads_(model: nn.Module, site: AttentionSite, heads: Iterable[int]) -> None:
    """Close query heads by zeros in what they are made of and in what reads them.

    Keys and values are zeroed where every query head that reads them is closed, now or before.  Position bias tables
    and what several attentions share stay.  Raises ModelError when the site has not all of these heads.
    """
    chosen = units_of(site.name, site.heads, heads)
    _zero_(model, site.output, chosen, rows=False)
    closed = closed_heads(model, site).reshape(site.key_value_heads, site.group_size)
    groups = closed.all(1).nonzero().flatten().tolist()
    queries = [site.query, *(part for part in site.extra if isinstance(model.get_submodule(part.name), nn.Linear))]
    for part in queries:
        _zero_(model, part, chosen, rows=True)
    for part in (site.key, site.value):
        _zero_(model, part, groups, rows=True)


@torch.no_grad()
def zero_neurons_(model: nn.Module, site: FfnSite, neurons: Iterable[int]) -> None:
    """Close neurons by zeros in their rows of every producer (with the bias) and in their column of ``down``.

    Raises ModelError when the block has not all of these neurons.
    """
    chosen = units_of(site.name, site.width, neurons)
    _zero_(model, site.down, chosen, rows=False)
    for part in site.ups:
        _zero_(model, part, chosen, rows=True)


def closed_units(model: nn.Module, reader: Part) -> Tensor:
    """Return which units have only zero columns in the linear layer that reads them: (units,) bool, on the CPU."""
    module = model.get_submodule(reader.name)
    zero_column = (weight_of(module).detach() == 0).all(1 - input_dim(module)).cpu()
    return zero_column[reader.features].all(1)


def _zero_(model: nn.Module, part: Part, units: list[int], rows: bool) -> None:
    module = model.get_submodule(part.name)
    weight = weight_of(module)
    features = part.features[units].flatten().to(weight.device)
    weight.index_fill_(output_dim(module) if rows else input_dim(module), features, 0)
    bias = getattr(module, "bias", None)
    if rows and bias is not None:
        bias.index_fill_(0, features, 0)
