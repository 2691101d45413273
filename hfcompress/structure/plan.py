"""Which heads and neurons stay when the closed ones go: as few as the architecture can express."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import ModelError
from hfcompress.structure.sites import AttentionSite, FfnSite
from hfcompress.structure.zeros import closed_heads, closed_neurons


@dataclass(frozen=True)
class Kept:
    """The units of one site that stay, as rising indices: query heads and key/value heads, or neurons."""

    units: tuple[int, ...]
    key_value_heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The sites of a model and what stays of each, by the site's name."""

    attention: Sequence[AttentionSite]
    ffn: Sequence[FfnSite]
    heads: Mapping[str, Kept]
    neurons: Mapping[str, Kept]

    @property
    def removes(self) -> bool:
        """Say whether anything goes."""
        now = {site.name: site.heads for site in self.attention} | {site.name: site.width for site in self.ffn}
        kept = {**self.heads, **self.neurons}
        return any(len(kept[name].units) != size for name, size in now.items())

    @property
    def empties(self) -> bool:
        """Say whether a site loses everything."""
        return any(not kept.units for kept in (*self.heads.values(), *self.neurons.values()))


def plan_heads(model: nn.Module, sites: Sequence[AttentionSite], least: int) -> dict[str, Kept]:
    """Return the heads that stay per attention.

    Each kept key/value head keeps the same number of query heads, so some closed heads may stay, as zeros.  Attentions
    that share a position bias keep the same heads; those that read their head count from one config keep the same
    number.  An attention that would lose all its heads keeps ``least`` key/value heads, and one if generation caches
    its keys: a cache counts the tokens it has seen by the keys of one layer.

    Raises ModelError when every head of the model is closed.
    """
    closed = {site.name: closed_heads(model, site) for site in sites}
    if sites and all(bool(one.all()) for one in closed.values()):
        raise ModelError("Every attention head of the model is closed; a model must keep at least one.")
    for site in sites:
        if site.same_heads_as is not None:
            closed[site.same_heads_as] = closed[site.same_heads_as] & closed[site.name]
    for site in sites:
        if site.same_heads_as is not None:
            closed[site.name] = closed[site.same_heads_as]
    counts: dict[str, tuple[int, int]] = {}
    for site in sites:
        open_heads = (~closed[site.name]).reshape(site.key_value_heads, site.group_size).sum(1)
        floor = max(least, int(site.cached), int(_never_empty(model, site.output.name)))
        groups = max(int((open_heads > 0).sum()), min(floor, site.key_value_heads))
        counts[site.name] = groups, max([min(groups, 1), *open_heads.tolist()])
    _equal_where_the_config_counts(sites, counts)
    return {site.name: _kept(closed[site.name], site, *counts[site.name]) for site in sites}


def plan_neurons(model: nn.Module, sites: Sequence[FfnSite], least: int) -> dict[str, Kept]:
    """Return the neurons that stay per feed-forward block; one that would lose all keeps ``least``.

    Raises ModelError when every neuron of the model is closed.
    """
    closed = {site.name: closed_neurons(model, site) for site in sites}
    if sites and all(bool(one.all()) for one in closed.values()):
        raise ModelError("Every feed-forward neuron of the model is closed; a model must keep at least one.")
    kept = {}
    for site in sites:
        units = (~closed[site.name]).nonzero().flatten().tolist()
        floor = max(least, int(_never_empty(model, site.down.name)))
        kept[site.name] = Kept(tuple(units or range(min(floor, site.width))))
    return kept


def _never_empty(model: nn.Module, name: str) -> bool:
    """Say whether a layer cannot run without inputs: Conv1D flattens them by their size, which may not be zero."""
    return isinstance(model.get_submodule(name), Conv1D)


def _equal_where_the_config_counts(sites: Sequence[AttentionSite], counts: dict[str, tuple[int, int]]) -> None:
    bound = [site.name for site in sites if site.config_counts]
    if bound:
        most = tuple(max(column) for column in zip(*(counts[name] for name in bound)))
        counts.update(dict.fromkeys(bound, (most[0], most[1])))


def _kept(closed: Tensor, site: AttentionSite, groups: int, per_group: int) -> Kept:
    """Keep ``groups`` key/value heads and ``per_group`` query heads of each: the open ones, then the first closed."""
    by_group = closed.reshape(site.key_value_heads, site.group_size)
    chosen = torch.argsort(by_group.all(1).int(), stable=True)[:groups].sort().values.tolist()
    units = []
    for group in chosen:
        members = torch.argsort(by_group[group].int(), stable=True)[:per_group].sort().values
        units += (group * site.group_size + members).tolist()
    return Kept(tuple(units), tuple(chosen))
