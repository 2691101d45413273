"""Masks over a model's weights: which weights are pruned, and keeping them exactly zero."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfcompress.errors import ModelError
from hfcompress.pruning.patterns import (
    Blocks,
    NofM,
    Pattern,
    block_counts,
    block_scores,
    nofm_pruned,
    spread_blocks,
    whole_units,
)
from hfcompress.pruning.select import smallest
from hfcompress.pruning.targets import prunable_weights
from hfcompress.structure import LayerStack, layer_stacks

__all__ = [
    "GradientMask",
    "Masks",
    "apply_masks_",
    "masks_from_zeros",
    "prunable_weights",
    "prune_masks_",
    "sparsity_by_layer",
    "sparsity_of",
]

Masks = dict[str, Tensor]
LOWEST = torch.finfo(torch.float32).min
LAST = 1e30  # more than any score, and its sum over a block is finite


def masks_from_zeros(weights: Mapping[str, Tensor]) -> Masks:
    """Return masks (True: kept, one byte a weight) that hold today's zeros in place."""
    return {name: weight.detach() != 0 for name, weight in weights.items()}


def factors(mask: Tensor) -> Tensor:
    """Return a mask's bytes as integers 0 and 1, which CPUs multiply by faster than by booleans."""
    return mask.view(torch.int8)


@torch.no_grad()
def prune_masks_(
    masks: Masks,
    score: Callable[[str], Tensor],
    sparsity: float,
    scope: str,
    pattern: Pattern | None = None,
    unseen: Collection[str] = (),
) -> None:
    """Prune the lowest scores to ``sparsity``, of all weights together or of each layer, in place.

    masks: True where a weight is kept; what is pruned stays pruned and counts towards the sparsity.
    score: returns the float32 scores of a weight by name, of its mask's shape; it is called several times so that no
    copy of the model's scores is ever held.  Masks of matrices that patterns apply to lie (outputs, inputs).
    The count is rounded down to whole units of the pattern: never more than asked, and zeros inside blocks that stay
    count, too.  N:M ramps up to the pattern: at any sparsity below its own, what is pruned is a part of it.
    unseen: weights without scores as yet, which lose nothing now.
    """
    for names in [list(masks)] if scope == "global" else [[name] for name in masks]:
        units = _Units(masks, names, score, pattern, unseen)
        wanted = whole_units(sparsity, sum(masks[name].numel() for name in names))
        if isinstance(pattern, Blocks):
            dead = sum(masks[name].numel() - int(masks[name].sum()) for name in names)
            marked = smallest(units, wanted - dead, _Living(masks, names, pattern))
        else:
            marked = smallest(units, wanted)
        for name, one in zip(names, marked):
            if name in unseen:
                continue
            masks[name] &= ~(spread_blocks(one, pattern, masks[name].shape[1]) if isinstance(pattern, Blocks) else one)


@dataclass(frozen=True)
class _Living:
    """How many weights each block of each mask still keeps, which is what pruning it adds: counted when asked for."""

    masks: Masks
    names: list[str]
    blocks: Blocks

    def __getitem__(self, index: int) -> Tensor:
        return block_counts(self.masks[self.names[index]], self.blocks)


@dataclass(frozen=True)
class _Units:
    """The scores of what is pruned as one, weight by weight: made anew each time that they are gone through."""

    masks: Masks
    names: list[str]
    score: Callable[[str], Tensor]
    pattern: Pattern | None
    unseen: Collection[str]

    def __iter__(self) -> Iterator[Tensor]:
        for name in self.names:
            mask = self.masks[name]
            scores = torch.full_like(mask, LAST, dtype=torch.float32) if name in self.unseen else self.score(name)
            yield self._units_of(scores, mask)

    def _units_of(self, scores: Tensor, mask: Tensor) -> Tensor:
        if isinstance(self.pattern, Blocks):
            # A block with dead weights is worth what lives in it; one without life goes first.
            live = block_scores(scores * factors(mask), self.pattern)
            return live.where(block_scores(mask, self.pattern) > 0, LOWEST)
        # Dead weights go first.  An arithmetic penalty is faster than `where`.
        scores = scores.sub(factors(~mask), alpha=-LOWEST)
        if isinstance(self.pattern, NofM):
            return scores.where(nofm_pruned(scores, self.pattern), torch.inf)
        return scores


@torch.no_grad()
def apply_masks_(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set every pruned weight to zero, in place."""
    if masks:
        torch._foreach_mul_([weights[name].detach() for name in masks], [factors(mask) for mask in masks.values()])


@dataclass(frozen=True)
class GradientMask:
    """A hook that zeroes the gradient of a parameter's pruned weights; the mask is looked up, because it changes."""

    masks: Masks
    name: str

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> None:
        """Zero what the parameter's gradient has gathered for pruned weights, in place."""
        if weight.grad is not None:
            # CPUs make a float copy of the mask first: in memory that backward has just freed, so in their caches.
            weight.grad.mul_(factors(self.masks[self.name]))


def sparsity_of(weights: Mapping[str, Tensor]) -> float:
    """Return the share of these weights that is zero, counted from the weights."""
    total = sum(weight.numel() for weight in weights.values())
    return sum(weight.numel() - int(weight.count_nonzero()) for weight in weights.values()) / max(1, total)


def _stacks(model: nn.Module) -> list[LayerStack]:
    try:
        return layer_stacks(model)
    except ModelError:  # it has none, as convolutional networks have none
        return []


def sparsity_by_layer(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the sparsity of each layer of the stacks, by the layer's name; nothing where a model has no stack."""
    layers = [f"{stack.name}.{index}" for stack in _stacks(model) for index in range(len(stack))]
    inside = {layer: {n: w for n, w in weights.items() if n.startswith(layer + ".")} for layer in layers}
    return {layer: sparsity_of(found) for layer, found in inside.items() if found}
