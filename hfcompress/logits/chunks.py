"""Sums of row-wise losses over logits of any vocabulary size, without a float32 copy of those in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Logits in float32 at one time: what a CPU's caches hold, or what keeps a GPU busy.
ELEMENTS_PER_CHUNK = {"cpu": 2**19}
ELEMENTS_ELSEWHERE = 2**25

# Takes the student's logits of some rows in float32, (rows, classes), and which of all rows they are; returns the
# loss of each row and its gradient.
Term = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class _WeightedSum(torch.autograd.Function):
    """The gradient is made in the forward pass, chunk by chunk, and kept in the logits' own dtype.

    So logits in float32 have a gradient in float32 beside them, and in the backward pass its multiple as a third.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Tensor, weights: Sequence[float], terms: Sequence[Term]
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(logits.dtype, torch.float32)
        sums = torch.zeros(len(terms), dtype=exact, device=logits.device)
        gradient = torch.zeros_like(logits)
        size = max(1, ELEMENTS_PER_CHUNK.get(logits.device.type, ELEMENTS_ELSEWHERE) // max(1, logits.shape[-1]))
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            student = logits.index_select(0, rows[part]).to(exact)
            total: Tensor | None = None
            for place, (weight, term) in enumerate(zip(weights, terms)):
                loss, slope = term(student, part)
                sums[place] += loss.sum()
                total = slope.mul_(weight) if total is None else total.add_(slope, alpha=weight)
            if total is not None:
                gradient.index_copy_(0, rows[part], total.to(logits.dtype))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return (sums * torch.tensor(weights, dtype=exact, device=sums.device)).sum(), sums

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None, None


def sum_over_rows(
    logits: Tensor, rows: Tensor, weights: Sequence[float], terms: Sequence[Term]
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of all terms over the rows, and each term's own sum, (terms,), without a gradient.

    logits: (all rows, classes) in any dtype.  rows: (counted rows,) indices; the gradient of all others is zero.
    Both results are in float32 or better.
    """
    return _WeightedSum.apply(logits, rows, list(weights), list(terms))
