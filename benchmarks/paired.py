"""Accuracies of SST-2's rows compared answer by answer, with the standard errors of that.

A row is compared with the other one's answers to the same sentences; a sentence's differences are averaged over the
seeds, as all seeds hold out the same ones, and the standard error is that of the sentences, without the chance in
training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from table import show

if TYPE_CHECKING:
    from sst2 import Results


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
    return paired_means(*([[100.0 * int(right) for right in seed] for seed in seeds] for seeds in (ones, others)))


def paired_means(ones: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return by how much the mean of one row is above another's, and the standard error of that.

    ones, others: for each seed a number for each of the same held-out examples, whose differences are averaged
    over the seeds first.
    """
    seeds = [[mine - its for mine, its in zip(*pair, strict=True)] for pair in zip(ones, others, strict=True)]
    examples = [statistics.mean(example) for example in zip(*seeds, strict=True)]
    return statistics.mean(examples), statistics.stdev(examples) / math.sqrt(len(examples))
