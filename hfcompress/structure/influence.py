"""Read off an autograd graph which features act on which units (heads or neurons), by gradients alone."""

from __future__ import annotations

import torch
from torch import Tensor

NONE, SEVERAL = -1, -2


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """Return the leaf tensors of a tensor's autograd graph, parameters included."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    found, seen, todo = [], {tensor.grad_fn}, [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return found


def acts_on(tensor: Tensor, units: Tensor, leaf: Tensor, feature_dims: int = 1) -> Tensor:
    """Return for each feature of ``leaf`` the one unit of ``tensor`` that it acts on, NONE or SEVERAL.

    units: integers that broadcast to ``tensor``, the unit that each element belongs to.  feature_dims: how many last
    dimensions of ``leaf`` count its features; the result is flat over them.

    A backward pass from random cotangents, scaled by 1 or 2 after one bit of the unit's number, gives 1 or 2 times the
    unscaled gradient for a feature that acts on a single unit: one pass per bit reads the number off, in any
    precision, and a feature that acts on several units gives something between.
    """
    if units.numel() == 0 or leaf.numel() == 0:
        return torch.full(leaf.shape[-feature_dims:], NONE).flatten()
    random = torch.Generator().manual_seed(1)
    cotangent = (torch.rand(tensor.shape, generator=random) + 1).to(tensor.device, tensor.dtype)

    def pulled_back(scale: Tensor | int) -> Tensor:
        gradient = torch.autograd.grad(tensor, leaf, cotangent * scale, retain_graph=True, allow_unused=True)[0]
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        return gradient.flatten(-feature_dims).flatten(0, -2).double()

    base = pulled_back(1)
    energy = base.square().sum(0)
    unit = torch.zeros_like(energy, dtype=torch.long)
    several = torch.zeros_like(energy, dtype=torch.bool)
    for bit in range(max(1, int(units.max()).bit_length())):
        scale = 1 + ((units >> bit) & 1)
        ratio = (pulled_back(scale.to(tensor.device)) * base).sum(0) / energy
        is_set = ratio > 1.5
        several |= (ratio - 1 - is_set.double()).abs() > 0.05
        unit += is_set.long() << bit
    unit[several] = SEVERAL
    unit[energy == 0] = NONE
    return unit.cpu()
