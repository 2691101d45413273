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


def plan_heads(
    sites: Sequence[AttentionSite], closed: Mapping[str, Tensor], least: Mapping[str, int] | None = None
) -> dict[str, Kept]:
    """Return the heads that stay per attention when the ``closed`` ones, (heads,) bool by the site's name, may go.

    Each kept key/value head keeps the same number of query heads, so some closed heads may have to stay.  Attentions
    that share a position bias keep the same heads; those that read their head count from the config keep the same
    number.  An attention that would lose all its heads keeps ``least`` key/value heads (by name, none by default), and
    one if generation caches its keys: a cache counts the tokens it has seen by the keys of one layer.

    Raises ModelError when every head is closed.
    """
    if sites and all(bool(closed[site.name].all()) for site in sites):
        raise ModelError("Every attention head of the model is closed; a model must keep at least one.")
    shared: dict[str, Tensor] = {}
    for site in sites:
        owner = site.same_heads_as or site.name
        shared[owner] = shared.get(owner, closed[site.name]) & closed[site.name]
    together = {site.name: shared[site.same_heads_as or site.name] for site in sites}
    counts: dict[str, tuple[int, int]] = {}
    for site in sites:
        open_heads = (~together[site.name]).reshape(site.key_value_heads, site.group_size).sum(1)
        floor = max((least or {}).get(site.name, 0), int(site.cached))
        groups = max(int((open_heads > 0).sum()), min(floor, site.key_value_heads))
        counts[site.name] = groups, max([min(groups, 1), *open_heads.tolist()])
    _equal_where_the_config_counts(sites, counts)
    return {site.name: _kept(together[site.name], site, *counts[site.name]) for site in sites}


def plan_neurons(
    sites: Sequence[FfnSite], closed: Mapping[str, Tensor], least: Mapping[str, int] | None = None
) -> dict[str, Kept]:
    """Return the neurons that stay per feed-forward block when the ``closed`` ones, (width,) bool by name, may go.

    A block that would lose all its neurons keeps ``least`` (by name, none by default).  Raises ModelError when every
    neuron is closed.
    """
    if sites and all(bool(closed[site.name].all()) for site in sites):
        raise ModelError("Every feed-forward neuron of the model is closed; a model must keep at least one.")
    kept = {}
    for site in sites:
        units = (~closed[site.name]).nonzero().flatten().tolist()
        kept[site.name] = Kept(tuple(units or range(min((least or {}).get(site.name, 0), site.width))))
    return kept


def plan_shrink(
    model: nn.Module, attention: Sequence[AttentionSite], ffn: Sequence[FfnSite], least_heads: int, least_neurons: int
) -> Plan:
    """Plan the removal of every head and neuron whose weights say that it is closed."""
    heads = {site.name: closed_heads(model, site) for site in attention}
    neurons = {site.name: closed_neurons(model, site) for site in ffn}
    floors = {site.name: max(least_heads, _least(model, site.output.name)) for site in attention}
    floors |= {site.name: max(least_neurons, _least(model, site.down.name)) for site in ffn}
    return Plan(attention, ffn, plan_heads(attention, heads, floors), plan_neurons(ffn, neurons, floors))


def _least(model: nn.Module, name: str) -> int:
    """Return how many units a reader needs: Conv1D flattens its input by a size that may not be zero."""
    return int(isinstance(model.get_submodule(name), Conv1D))


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
