"""Find the entries with the smallest scores, exactly, without sorting or copying the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

HALF_WORD = 1 << 16


def _ordered_bits(scores: Tensor) -> Tensor:
    """Return float32 scores as flat int32 in the same order; -0.0 and 0.0 are equal."""
    bits = (scores.detach().float().flatten() + 0.0).view(torch.int32)
    # Negative floats grow downwards as integers, so all bits but the sign are turned round.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _histogram(bits: Tensor, upper: int | None) -> Tensor:
    """Count upper half words (from -2^15), or the lower half words of the entries whose upper half word is given."""
    high = bits >> 16
    keys = high + (HALF_WORD >> 1) if upper is None else bits[high == upper] & (HALF_WORD - 1)
    return torch.bincount(keys, minlength=HALF_WORD).cpu()


def _bucket_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bucket that holds the entry of this rank (from 0), and how much lies below the bucket."""
    cumulative = counts.cumsum(0)
    bucket = int(torch.searchsorted(cumulative, rank, right=True))
    return bucket, int(cumulative[bucket - 1]) if bucket else 0


def smallest(scores: Iterable[Tensor], count: int, sizes: Sequence[int] | None = None) -> list[Tensor]:
    """Mark the smallest entries over all tensors together, as many as weigh ``count`` at most; ties never add more.

    scores: of any shapes and signs, no NaN.  It is gone through three times, so an object that makes each tensor when
    it is asked for keeps the memory at one tensor's worth.  sizes: what one entry of each tensor weighs, 1 by default.
    Returns boolean tensors of the same shapes.  Two histograms of half words find the threshold (a radix select), so
    nothing is sorted.  Among equal scores those in earlier tensors and earlier places go first.
    """
    high = _weighted_histogram(scores, sizes, None)
    total = int(high.sum())
    if count <= 0 or count >= total:
        return [torch.full(one.shape, count > 0, dtype=torch.bool, device=one.device) for one in scores]
    bucket, below = _bucket_of(high, count - 1)
    upper = bucket - (HALF_WORD >> 1)
    lower, below_here = _bucket_of(_weighted_histogram(scores, sizes, upper), count - 1 - below)
    threshold = upper * HALF_WORD + lower
    left = count - below - below_here
    marked = []
    for index, one in enumerate(scores):
        size = 1 if sizes is None else sizes[index]
        bits = _ordered_bits(one)
        chosen = bits < threshold
        if left >= size:
            ties = (bits == threshold).nonzero().flatten()[: left // size]
            chosen[ties] = True
            left -= len(ties) * size
        marked.append(chosen.view(one.shape))
    return marked


def _weighted_histogram(scores: Iterable[Tensor], sizes: Sequence[int] | None, upper: int | None) -> Tensor:
    counts = torch.zeros(HALF_WORD, dtype=torch.int64)
    for index, one in enumerate(scores):
        counts += _histogram(_ordered_bits(one), upper) * (1 if sizes is None else sizes[index])
    return counts
