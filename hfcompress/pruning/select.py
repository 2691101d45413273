"""Find the weights with the smallest scores, exactly, without sorting or copying the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HALF_WORD = 1 << 16


def _ordered_bits(scores: Tensor) -> Tensor:
    """Return the bits of non-negative float32 scores as int32: integers in the same order as the scores."""
    return scores.detach().float().flatten().view(torch.int32)


def _histogram(bits: Tensor, upper: int | None) -> Tensor:
    """Count upper half words, or the lower half words of the entries whose upper half word is ``upper``."""
    high = bits >> 16
    keys = high if upper is None else bits[high == upper] & (HALF_WORD - 1)
    return torch.bincount(keys, minlength=HALF_WORD).cpu()


def _bucket_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bucket that holds the entry of this rank (from 0), and how many entries lie below the bucket."""
    cumulative = counts.cumsum(0)
    bucket = int(torch.searchsorted(cumulative, rank, right=True))
    return bucket, int(cumulative[bucket - 1]) if bucket else 0


def smallest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Mark the ``count`` smallest entries over all tensors together; a tie never marks more than asked.

    scores: non-negative, of any shapes.  Returns boolean tensors of the same shapes.  Two histograms of half words
    find the threshold (a radix select), so the extra memory is one tensor's worth and nothing is sorted.  Among equal
    scores those in earlier tensors and earlier places go first.
    """
    if count <= 0:
        return [torch.zeros_like(one, dtype=torch.bool) for one in scores]
    total = sum(one.numel() for one in scores)
    if count >= total:
        return [torch.ones_like(one, dtype=torch.bool) for one in scores]
    rank = count - 1
    upper, below = _bucket_of(_sum_histograms(scores, None), rank)
    lower, below_here = _bucket_of(_sum_histograms(scores, upper), rank - below)
    threshold = upper * HALF_WORD + lower
    ties_wanted = count - below - below_here
    marked = []
    for one in scores:
        bits = _ordered_bits(one)
        chosen = bits < threshold
        if ties_wanted > 0:
            ties = (bits == threshold).nonzero().flatten()[:ties_wanted]
            chosen[ties] = True
            ties_wanted -= len(ties)
        marked.append(chosen.view(one.shape))
    return marked


def _sum_histograms(scores: Sequence[Tensor], upper: int | None) -> Tensor:
    return torch.stack([_histogram(_ordered_bits(one), upper) for one in scores]).sum(0)
