"""The task loss of a language model, in the same pass over its logits as the distillation."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(student: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each row, and its gradient.  student: (rows, classes) logits.  labels: (rows,)."""
    log_q = torch.log_softmax(student, dim=-1)
    places = labels[:, None]
    loss = -log_q.gather(-1, places).squeeze(-1)
    slope = log_q.exp_()
    return loss, slope.scatter_add_(-1, places, torch.full_like(places, -1, dtype=slope.dtype))
