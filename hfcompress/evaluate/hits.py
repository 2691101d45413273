"""Which examples a model answered rightly, kept small, and how sure a difference between two models is."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np

from hfcompress.errors import DataError

RESAMPLES = 10_000


def pack_hits(hits: Sequence[bool]) -> str:
    """Return a bit for each example, in order, as text: their number, a colon, the bytes in base64."""
    packed = np.packbits(np.asarray(hits, dtype=bool))
    return f"{len(hits)}:{base64.b64encode(packed.tobytes()).decode()}"


def unpack_hits(text: str) -> np.ndarray:
    """Return what ``pack_hits`` was given, (examples,) bool.  Raises DataError for any other text."""
    count, _, encoded = text.partition(":")
    try:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(encoded, validate=True), dtype=np.uint8))
        if not int(count) <= len(bits) < int(count) + 8:
            raise ValueError(f"{len(bits)} bits for {count} examples")
    except ValueError as error:
        raise DataError(f"'correct' of a measurement cannot be read: {error}.") from error
    return bits[: int(count)].astype(bool)


def paired_bootstrap(before: np.ndarray, after: np.ndarray, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the percentile interval of the difference in accuracy (Efron and Tibshirani 1993, chapter 13).

    before, after: (examples,) bool, the same examples in the same order.  An example counts 1 where only the second
    model is right, -1 where only the first is, 0 elsewhere, so drawing examples with replacement is drawing these
    three counts from a multinomial distribution.  Raises DataError for other examples or none.
    """
    if len(before) != len(after) or len(before) == 0:
        raise DataError(f"{len(before)} and {len(after)} examples cannot be paired.")
    count = len(before)
    gained, lost = int(np.sum(after & ~before)), int(np.sum(before & ~after))
    shares = [gained / count, lost / count, (count - gained - lost) / count]
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=RESAMPLES)
    differences = (drawn[:, 0] - drawn[:, 1]) / count
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
