"""Which heads or neurons can only go together, and choosing among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import ModelError
from hfcompress.pruning.patterns import whole_units
from hfcompress.pruning.select import smallest
from hfcompress.structure import AttentionSite, FfnSite


@dataclass(frozen=True)
class Bundle:
    """Units of one or several sites that the architecture ties.

    units: (columns, items, members) numbers of units, counted through all sites.  The members of an item go together,
    and every column loses as many items as the others: with the lowest of each first, these are the bundle's lanes.
    spare: how many items of each column stay at least.
    """

    units: Tensor
    spare: int

    @property
    def lanes(self) -> int:
        """Number of items per column that may go."""
        return max(0, self.units.shape[1] - self.spare)

    @property
    def size(self) -> int:
        """Units in one lane."""
        return self.units.shape[0] * self.units.shape[2]

    def in_order(self, scores: Tensor, closed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each column's items, the closed ones first and then those with the lowest scores.

        scores, closed: (all units,).  Returns their units, (columns, items, members), the sums of their scores and
        whether they are closed, (columns, items).
        """
        is_closed = closed[self.units].all(2)
        sums = scores.where(~closed, 0.0)[self.units].sum(2)
        order = sums.masked_fill(is_closed, -torch.inf).argsort(dim=1, stable=True)
        units = self.units.gather(1, order[:, :, None].expand_as(self.units))
        return units, sums.gather(1, order), is_closed.gather(1, order)


def neuron_bundles(sites: Sequence[FfnSite], modules: Mapping[str, torch.nn.Module]) -> list[Bundle]:
    """Return one bundle per block: any neuron may go, but a Conv1D needs one.  modules: by name."""
    firsts = _firsts(site.width for site in sites)
    return [
        Bundle((first + torch.arange(site.width)).reshape(1, -1, 1), int(isinstance(modules[site.down.name], Conv1D)))
        for site, first in zip(sites, firsts)
        if site.width
    ]


def head_bundles(sites: Sequence[AttentionSite], modules: Mapping[str, torch.nn.Module], grouped: str) -> list[Bundle]:
    """Return what ``hfcompress.structure.plan_heads`` can take from the sites.

    grouped: where query heads share keys, ``whole`` groups of one key/value head go, or ``even``: one query head of
    every group.
    Attentions that share a position bias lose the same heads, those that read their number from the config the same
    number.  A cached attention, and one whose output projection is a Conv1D, keeps one item.  modules: by name.
    """
    numbers = {}
    for site, first in zip(sites, _firsts(site.heads for site in sites)):
        units = (first + torch.arange(site.heads)).reshape(site.key_value_heads, site.group_size)
        numbers[site.name] = units[None] if grouped == "whole" or site.group_size == 1 else units[:, :, None]
    together: dict[str, list[AttentionSite]] = {}
    for site in sites:
        together.setdefault(site.same_heads_as or site.name, []).append(site)
    bundles: list[tuple[Tensor, int]] = []
    counted: list[tuple[Tensor, int]] = []
    for members in together.values():
        units = torch.cat([numbers[site.name] for site in members], dim=2)
        spare = any(site.cached or isinstance(modules[site.output.name], Conv1D) for site in members)
        (counted if any(site.config_counts for site in members) else bundles).append((units, int(spare)))
    if counted:
        bundles.append((torch.cat([units for units, _ in counted]), max(spare for _, spare in counted)))
    return [Bundle(units, spare) for units, spare in bundles if units.numel()]


def _firsts(sizes: Iterable[int]) -> list[int]:
    """Return the number of each site's first unit."""
    firsts = [0]
    for size in sizes:
        firsts.append(firsts[-1] + size)
    return firsts[:-1]


def close_lowest(
    bundles: Sequence[Bundle],
    scores: Tensor,
    closed: Tensor,
    sparsity: float,
    scope: str,
    unseen: Tensor | None = None,
) -> Tensor:
    """Return which units are closed when this share of them is, (all units,) bool; never more.

    scores: (all units,), not negative.  closed: units that stay closed and count, also where their item is still open.
    scope: ``global`` compares the means of lanes over all bundles, ``layer`` takes the share from each bundle.
    unseen: units whose scores mean nothing yet; bundles with such units lose none now.
    """
    result = closed.clone()
    for compared in scopes(bundles, scope):
        ordered = [bundle.in_order(scores, closed) for bundle in compared]
        lanes, counted = [], 0
        for bundle, (_, sums, is_closed) in zip(compared, ordered):
            may_go = 0 if unseen is not None and bool(unseen[bundle.units].any()) else bundle.lanes
            gone = is_closed.all(0)[:may_go]
            lanes.append((sums.sum(0) / bundle.size)[:may_go].masked_fill(gone, -torch.inf))
            counted += int(gone.sum()) * bundle.size
        total = sum(bundle.units.numel() for bundle in compared)
        stray = sum(int(closed[bundle.units].sum()) for bundle in compared) - counted
        marked = smallest(lanes, whole_units(sparsity, total) - stray, [bundle.size for bundle in compared])
        for (units, _, _), lane in zip(ordered, marked):
            result[units[:, : len(lane)][:, lane].flatten()] = True
    return result


def refuse_impossible(bundles: Sequence[Bundle], sparsity: float, scope: str, what: str) -> None:
    """Raise ModelError when more would have to go than can, or when the share is less than the smallest step.

    what: the units' plain name, heads or neurons.
    """
    total = sum(bundle.units.numel() for bundle in bundles)
    closing = 0
    for compared in scopes(bundles, scope):
        here = sum(bundle.units.numel() for bundle in compared)
        wanted = whole_units(sparsity, here)
        can_go = sum(bundle.lanes * bundle.size for bundle in compared)
        if wanted > can_go:
            where = "the model" if scope == "global" else "one layer"
            raise ModelError(
                f"sparsity={sparsity} asks for {wanted} of {here} {what} of {where}, but only {can_go} can go, since "
                f"some must stay. Give a sparsity of at most {can_go / here:.3g}."
            )
        closing += sum(1 for bundle in compared if bundle.size <= wanted)
    if sparsity > 0 and not closing:
        step = min(bundle.size / (total if scope == "global" else bundle.units.numel()) for bundle in bundles)
        raise ModelError(
            f"sparsity={sparsity} closes nothing: of {total} {what}, the smallest number that can go at once is "
            f"{min(bundle.size for bundle in bundles)}. Give a sparsity of at least {step:.3g}"
            f"{', or scope=global' if scope == 'layer' else ''}."
        )


def scopes(bundles: Sequence[Bundle], scope: str) -> list[list[Bundle]]:
    """Return the bundles that are compared with each other, group by group."""
    return [list(bundles)] if scope == "global" else [[bundle] for bundle in bundles]
