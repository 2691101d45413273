"""The task loss of a language model, in the same pass over its logits as the distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from hfcompress.logits.softmax import softmax_and_log_sum


def cross_entropy(student: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each row, and its gradient.  student: (rows, classes) logits.  labels: (rows,)."""
    slope, log_sum = softmax_and_log_sum(student)
    places = labels[:, None]
    loss = log_sum - student.gather(-1, places).squeeze(-1)
    return loss, slope.scatter_add_(-1, places, torch.full_like(places, -1, dtype=slope.dtype))
