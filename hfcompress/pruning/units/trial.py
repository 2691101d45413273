"""Which heads or neurons stand for all of a model when their removal is tried before training."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from hfcompress.pruning.units.bundles import Bundle
from hfcompress.structure import AttentionSite, FfnSite


def one_of_each_kind(bundles: Sequence[Bundle], sites: Sequence[AttentionSite | FfnSite]) -> dict[str, Tensor]:
    """Return what goes together of one bundle of each kind: (units,) bool by the name of a site that loses any.

    Sites are of one kind when their modules have the same names, but for numbers, and their units the same sizes.
    Bundles of one item per column are left out: without it, a site would have no unit.
    """
    sizes = [_size(site) for site in sites]
    owner = torch.arange(len(sites)).repeat_interleave(torch.tensor(sizes))
    chosen: dict[Hashable, Bundle] = {}
    for bundle in bundles:
        if bundle.lanes and bundle.units.shape[1] > 1:
            members = owner[bundle.units].unique().tolist()
            chosen.setdefault(frozenset(_kind(sites[index]) for index in members), bundle)
    closed = torch.zeros(sum(sizes), dtype=torch.bool)
    for bundle in chosen.values():
        closed[bundle.units[:, -1].flatten()] = True
    return {site.name: one for site, one in zip(sites, closed.split(sizes)) if bool(one.any())}


def _size(site: AttentionSite | FfnSite) -> int:
    return site.heads if isinstance(site, AttentionSite) else site.width


def _kind(site: AttentionSite | FfnSite) -> tuple[str, tuple[int, ...]]:
    sizes = (site.heads, site.key_value_heads, site.head_dim) if isinstance(site, AttentionSite) else (site.width,)
    return re.sub(r"\d+", "#", site.name), sizes
