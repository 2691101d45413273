"""In which order a layer's columns are rounded."""

from __future__ import annotations

import torch
from torch import Tensor


def group_order(importance: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Return the order of columns, and of groups, in which important ones come first (arXiv 2505.14638).

    Whole groups by their mean importance, and the columns inside each. importance: (in,), the Hessian's diagonal.
    Columns early in the loop have all later ones to absorb their error.
    """
    grouped = importance.view(-1, group_size or len(importance))
    groups = grouped.mean(1).argsort(descending=True, stable=True)
    inside = grouped.argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(len(grouped), device=importance.device).unsqueeze(1) * grouped.shape[1]
    return (inside + starts)[groups].flatten(), groups


def column_order(importance: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Return the order of columns in which important ones come first, and that of groups, which is as it was.

    Groups are met in parts, so their scales have to be there before the loop.  importance: (in,), the Hessian's
    diagonal.
    """
    groups = torch.arange(len(importance) // (group_size or len(importance)), device=importance.device)
    return importance.argsort(descending=True, stable=True), groups
