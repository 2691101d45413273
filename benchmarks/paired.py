"""Accuracies of SST-2's rows compared answer by answer, with the standard errors of that.

A row is compared with the other one's answers to the same sentences; a sentence's differences are averaged over the
seeds, as all seeds hold out the same ones, and the standard error is that of the sentences, without the chance in
training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from sst2 import Results
from table import show


def show_paired(pairs: Iterable[tuple[str, str]], results: Results) -> None:
    """Print the pairs of rows that are both there."""
    pairs = [(one, other) for one, other in pairs if one in results and other in results]
    if pairs:
        print()
        show(["row", "against", "points", "standard error"], [compared(*pair, results) for pair in pairs])


def compared(one: str, other: str, results: Results) -> list[str]:
    """Return the line of a pair in the table."""
    difference, error = paired(*([row["right"] for row in results[name]] for name in (one, other)))
    return [one, other, f"{difference:+.2f}", f"{error:.2f}"]


def paired(ones: Sequence[str], others: Sequence[str]) -> tuple[float, float]:
    """Return by how many points of accuracy one row is above another, and the standard error of that.

    ones, others: for each seed which of the same held-out sentences are right, as a string of 0 and 1.
    """
    seeds = [
        [int(mine) - int(its) for mine, its in zip(*pair, strict=True)] for pair in zip(ones, others, strict=True)
    ]
    points = [100 * statistics.mean(sentence) for sentence in zip(*seeds, strict=True)]
    return statistics.mean(points), statistics.stdev(points) / math.sqrt(len(points))
