"""Masks over a model's weights: which weights are pruned, and keeping them exactly zero."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.errors import ModelError
from hfcompress.pruning.criteria import CRITERIA
from hfcompress.pruning.select import smallest
from hfcompress.structure import layer_stacks, stack_linears

Masks = dict[str, Tensor]


def prunable_weights(
    model: nn.Module, targets: Iterable[str] | None = None, exclude: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """Return the weights to prune by name; a weight shared by two modules appears once.

    targets, exclude: name patterns (``fnmatch``) over module names; targets None means every linear and Conv1D module
    inside the layer stack, which leaves embeddings, the head and norms alone.
    Raises ModelError when nothing matches, with names that exist.
    """
    if targets is None:
        modules: dict[str, nn.Module] = stack_linears(model)
    else:
        modules = {name: module for name, module in model.named_modules() if _matches(name, targets)}
    found: dict[str, nn.Parameter] = {}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() < 2 or _matches(name, exclude):
            continue
        if all(weight is not other for other in found.values()):
            found[f"{name}.weight"] = weight
    if not found:
        examples = ", ".join(list(stack_linears(model))[:3])
        raise ModelError(
            f"No weight matches targets={_shown(targets)} and exclude={_shown(exclude)}. "
            f"Names in this model look like: {examples}."
        )
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _shown(patterns: Iterable[str] | None) -> str:
    return "None" if patterns is None else str(list(patterns))


def masks_from_zeros(weights: Mapping[str, Tensor]) -> Masks:
    """Return masks (True: kept) that hold today's zeros in place."""
    return {name: weight.detach() != 0 for name, weight in weights.items()}


def magnitude_masks(weights: Mapping[str, Tensor], sparsity: float, criterion: str, scope: str) -> Masks:
    """Prune the smallest scores to ``sparsity``, of all weights together or of each layer.

    Weights that are zero already have the smallest score there is, so they stay pruned.  The count is rounded down:
    never more than asked.
    """
    score = CRITERIA[criterion]
    groups = [list(weights)] if scope == "global" else [[name] for name in weights]
    masks: Masks = {}
    for names in groups:
        scores = [score(weights[name]) for name in names]
        count = int(sparsity * sum(one.numel() for one in scores))
        for name, pruned, one in zip(names, smallest(scores, count), scores):
            masks[name] = ~(pruned | (one == 0))
    return masks


@torch.no_grad()
def apply_masks_(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set every pruned weight to zero, in place."""
    for name, mask in masks.items():
        weights[name].mul_(mask)


@torch.no_grad()
def clear_moments_(optimizer: Any, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
    """Zero the optimizer's per-weight state (Adam's moments) where weights are pruned, in place."""
    state = getattr(optimizer, "optimizer", optimizer).state
    for name, mask in masks.items():
        weight = weights[name]
        for value in state.get(weight, {}).values():
            # 8-bit optimizers keep codes, whose 0 is not the number 0.
            if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
                value.mul_(mask)


def sparsity_of(weights: Mapping[str, Tensor]) -> float:
    """Return the share of these weights that is zero, counted from the weights."""
    total = sum(weight.numel() for weight in weights.values())
    return 1 - sum(int(weight.count_nonzero()) for weight in weights.values()) / total


def sparsity_by_layer(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the sparsity of each layer of the stacks, by the layer's name."""
    layers = [f"{stack.name}.{index}" for stack in layer_stacks(model) for index in range(len(stack))]
    inside = {layer: {n: w for n, w in weights.items() if n.startswith(layer + ".")} for layer in layers}
    return {layer: sparsity_of(found) for layer, found in inside.items() if found}
