"""Find the entries with the smallest scores, exactly, without sorting or copying the model."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

BUCKETS = 1 << 16
ZERO = BUCKETS >> 1  # the bucket of 0.0
UPPER_HALF = 1 if sys.byteorder == "little" else 0


class Sizes(Protocol):
    """What entries weigh, by the number of their tensor: all alike, or each its own, in a tensor of the same shape."""

    def __getitem__(self, index: int, /) -> int | Tensor:
        """Return the size of one tensor's entries."""
        ...


def smallest(scores: Iterable[Tensor], count: int, sizes: Sizes | None = None) -> list[Tensor]:
    """Mark the smallest entries over all tensors together, as many as weigh ``count`` at most; ties never add more.

    scores: of any shapes and signs, no NaN.  It is gone through twice, so an object that makes each tensor when it is
    asked for keeps the memory at one tensor's worth.  sizes: what entries weigh, whole numbers from 0, 1 by default.
    Returns boolean tensors of the same shapes.  A histogram over half words finds the bucket that the threshold lies
    in, and only what is inside that bucket is sorted.  Among equal scores those in earlier tensors and earlier places
    go first.
    """
    counts = torch.zeros(BUCKETS, dtype=torch.int64)
    shapes = []
    for index, one in enumerate(scores):
        counts += _histogram(one, 1 if sizes is None else sizes[index])
        shapes.append((one.shape, one.device))
    if count <= 0 or count >= int(counts.sum()):
        return [torch.full(shape, count > 0, dtype=torch.bool, device=device) for shape, device in shapes]
    bucket, below = _bucket_of(counts, count - 1)
    lowest, highest = _edges(bucket)
    marked, places, values = [], [], []
    for one in scores:
        flat = _flat(one)
        under = flat < lowest
        inside = ((flat <= highest) ^ under).nonzero().flatten()
        marked.append(under)
        places.append(inside)
        values.append(flat[inside].cpu())
    _mark_first_(marked, places, values, sizes, count - below)
    return [flat.view(shape) for flat, (shape, _) in zip(marked, shapes)]


def _mark_first_(
    marked: list[Tensor], places: list[Tensor], values: list[Tensor], sizes: Sizes | None, left: int
) -> None:
    """Mark the smallest of the candidates of all tensors as long as they weigh ``left`` at most."""
    lengths = [len(one) for one in values]
    together = torch.cat(values)
    if bool((together == together[0]).all()):
        order = torch.arange(len(together))
    else:
        order = together.sort(stable=True).indices
    weighs = torch.cat([_sizes_at(inside, sizes, index) for index, inside in enumerate(places)])
    taken = torch.zeros(len(together), dtype=torch.bool)
    taken[order[weighs[order].cumsum(0) <= left]] = True
    for flat, inside, mine in zip(marked, places, taken.split(lengths)):
        flat[inside[mine.to(inside.device)]] = True


def _sizes_at(places: Tensor, sizes: Sizes | None, index: int) -> Tensor:
    size = 1 if sizes is None else sizes[index]
    return size.flatten()[places].cpu() if isinstance(size, Tensor) else torch.full((len(places),), size)


def _flat(scores: Tensor) -> Tensor:
    return scores.detach().float().contiguous().flatten()


def _histogram(scores: Tensor, size: int | Tensor) -> Tensor:
    """Add up the entries' sizes by their upper half word: 65536 buckets in the order of the scores, int64."""
    high = _flat(scores).view(torch.int16)[UPPER_HALF::2]
    # Negative floats grow downwards as integers, so all bits but the sign are turned round.
    ordered = high ^ ((high >> 15) & 0x7FFF)
    if isinstance(size, Tensor):
        counts = size.new_zeros(BUCKETS).index_add_(0, ordered.int() + ZERO, size.flatten()).cpu()
    else:
        counts = torch.bincount(ordered.int() + ZERO, minlength=BUCKETS).cpu() * size
    # -0.0 is 0.0, so the buckets on both sides of zero are one.
    counts[ZERO] += counts[ZERO - 1]
    counts[ZERO - 1] = 0
    return counts


def _bucket_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bucket that holds the entry of this rank (from 0), and how much lies below the bucket."""
    cumulative = counts.cumsum(0)
    bucket = int(torch.searchsorted(cumulative, rank, right=True))
    return bucket, int(cumulative[bucket - 1]) if bucket else 0


def _edges(bucket: int) -> tuple[float, float]:
    """Return the smallest and the largest float of a bucket."""
    upper = bucket - ZERO
    lowest = _float_of(((upper - 1) if upper == 0 else upper) << 16)
    highest = _float_of((upper << 16) | 0xFFFF)
    # The buckets of the infinities hold nothing else.
    return (lowest if lowest == lowest else -torch.inf), (highest if highest == highest else torch.inf)


def _float_of(ordered: int) -> float:
    bits = ordered if ordered >= 0 else ordered ^ 0x7FFFFFFF
    return float(torch.tensor([bits], dtype=torch.int32).view(torch.float32))
