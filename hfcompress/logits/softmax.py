"""A softmax and the logarithm of its denominator, for one exponential of each logit."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_and_log_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax(logits), of the logits' shape, and the logarithm of the sum of their exponentials, (rows,).

    logits: (rows, classes). The largest probability, at least 1 / classes, tells the sum from the largest logit: log
    probabilities would take an exponential more of each logit, which on CPUs is most of a loss's time.
    """
    probabilities = torch.softmax(logits, dim=-1)
    return probabilities, logits.amax(-1) - probabilities.amax(-1).log()
