"""What a step of an optimizer does to pruned weights, and keeping its state off them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Their steps scale each weight and add a multiple of its own moments: from zero, with zeros, to zero.
_ELEMENTWISE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def keeps_zeros(optimizer: Any) -> bool:
    """Say whether a step leaves a weight at zero whose gradient and moments are zero.

    False for every class that is not known to do so, subclasses among them: what mixes weights, or rounds its
    moments, moves pruned weights, too.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    # Without epsilon Adam divides zero by zero.
    return type(inner) in _ELEMENTWISE and all(group.get("eps", 1) > 0 for group in inner.param_groups)


@torch.no_grad()
def clear_moments_(optimizer: Any, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
    """Zero the optimizer's per-weight state (Adam's moments) where weights are pruned, in place.

    masks: True where a weight is kept; they broadcast to the weights.
    """
    state = getattr(optimizer, "optimizer", optimizer).state
    for name, mask in masks.items():
        weight = weights[name]
        for value in state.get(weight, {}).values():
            # 8-bit optimizers keep codes, whose 0 is not the number 0.
            if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
                value.mul_(mask.view(torch.int8))
