"""How long one call of a model takes: the median and the slow end of many calls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hfcompress.evaluate.speed import forward_seconds

TOKEN, FORWARD = "new token", "forward pass"
CALLS, WARM_UPS = 40, 3


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call, over ``calls`` of them after a warm-up.

    what: ``new token`` (decoding) or ``forward pass``.  length: tokens of the prompt or of a row, None for inputs that
    are not tokens.  p95_ms: 95 of 100 calls took no longer.
    """

    what: str
    batch: int
    length: int | None
    median_ms: float
    p95_ms: float
    calls: int

    @classmethod
    def of(cls, what: str, batch: int, length: int | None, seconds: Sequence[float]) -> Latency:
        """Sum up timed calls; the 95th percentile is by nearest rank, so it is one of them."""
        ranked = sorted(seconds)
        slow = ranked[math.ceil(0.95 * len(ranked)) - 1]
        return cls(what, batch, length, 1000 * statistics.median(ranked), 1000 * slow, len(ranked))


def forward_latency(model: nn.Module, batch: Mapping[str, Tensor], calls: int = CALLS) -> Latency:
    """Time forward passes of a batch's first row alone, padding included."""
    row = {name: tensor[:1] for name, tensor in batch.items()}
    seconds = forward_seconds(model, row, calls, WARM_UPS)
    length = row["input_ids"].shape[-1] if "input_ids" in row else None
    return Latency.of(FORWARD, 1, length, seconds)
