"""Sparsity patterns: pure functions over the scores of one matrix, laid out (outputs, inputs) as ``nn.Linear`` has it.

Lower scores are pruned first.  Conv1D weights lie the other way round: pass their transpose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.pruning.select import smallest


@dataclass(frozen=True)
class NofM:
    """Of every ``group`` neighbours along the input dimension, at most ``kept`` are not zero: "2:4", "4:8"."""

    kept: int
    group: int

    @property
    def sparsity(self) -> float:
        """The share of weights that the pattern sets to zero."""
        return (self.group - self.kept) / self.group

    def divides(self, outputs: int, inputs: int) -> bool:
        """Say whether a matrix of this shape consists of whole groups."""
        return inputs % self.group == 0


@dataclass(frozen=True)
class Blocks:
    """Weights are pruned in blocks of ``rows`` outputs by ``columns`` inputs; columns None means whole rows."""

    rows: int
    columns: int | None

    def size(self, inputs: int) -> int:
        """Return the number of weights in one block of a matrix with so many inputs."""
        return self.rows * (self.columns or inputs)

    def divides(self, outputs: int, inputs: int) -> bool:
        """Say whether a matrix of this shape consists of whole blocks."""
        return outputs % self.rows == 0 and inputs % (self.columns or inputs) == 0


Pattern = NofM | Blocks


def parse_pattern(text: str) -> Pattern:
    """Read "N:M" (N of M are kept), "AxB" (blocks of A outputs by B inputs) or "row".

    Raises ValueError for anything else, and for a pattern that keeps nothing or prunes nothing.
    """
    if text == "row":
        return Blocks(1, None)
    found = re.fullmatch(r"([1-9]\d{0,3})([:x])([1-9]\d{0,3})", text)
    if found is None:
        raise ValueError(f"pattern '{text}' is not 'row', N:M such as '2:4', or AxB such as '4x1'")
    first, second = int(found[1]), int(found[3])
    if found[2] == "x":
        return Blocks(first, second)
    if first >= second:
        raise ValueError(f"pattern '{text}' keeps {first} of every {second} weights, so it prunes nothing")
    return NofM(first, second)


def nofm_pruned(scores: Tensor, pattern: NofM) -> Tensor:
    """Mark the ``group - kept`` smallest scores of every group along the last dimension; ties mark the earlier one.

    scores: (outputs, inputs), no NaN.  Returns a boolean tensor of the same shape; every group has exactly as many
    marks as the next.
    """
    groups = scores.unflatten(-1, (-1, pattern.group))
    # Counting who comes before whom needs `group` passes, which for groups this small is far cheaper than sorting.
    rank = torch.zeros_like(groups, dtype=torch.int16)
    for place in range(pattern.group):
        other = groups[..., place : place + 1]
        before = other < groups
        before[..., place + 1 :] |= other == groups[..., place + 1 :]
        rank += before
    return (rank < pattern.group - pattern.kept).flatten(-2)


def block_scores(scores: Tensor, blocks: Blocks) -> Tensor:
    """Return the mean score of each block: (outputs / rows, inputs / columns), in float32."""
    rows, columns = blocks.rows, blocks.columns or scores.shape[1]
    return scores.float().unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).mean((1, 3))


def block_counts(mask: Tensor, blocks: Blocks) -> Tensor:
    """Return how many entries of a mask are True in each block: (outputs / rows, inputs / columns), int64."""
    rows, columns = blocks.rows, blocks.columns or mask.shape[1]
    return mask.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).sum((1, 3))


def spread_blocks(chosen: Tensor, blocks: Blocks, inputs: int) -> Tensor:
    """Return chosen blocks (outputs / rows, inputs / columns) as a mask over weights (outputs, inputs)."""
    return chosen.repeat_interleave(blocks.rows, 0).repeat_interleave(blocks.columns or inputs, 1)


def pruned_by_pattern(scores: Tensor, sparsity: float, pattern: Pattern | None) -> Tensor:
    """Mark what one matrix loses to reach ``sparsity``, never more than asked.  Returns a boolean (outputs, inputs).

    scores: (outputs, inputs); the pattern must divide it.  N:M decides the sparsity itself and ignores the number.
    """
    if isinstance(pattern, NofM):
        return nofm_pruned(scores, pattern)
    if pattern is None:
        return smallest([scores], whole_units(sparsity, scores.numel()))[0]
    size = pattern.size(scores.shape[1])
    blocks = block_scores(scores, pattern)
    chosen = smallest([blocks], whole_units(sparsity, blocks.numel() * size) // size)[0]
    return spread_blocks(chosen, pattern, scores.shape[1])


def whole_units(sparsity: float, total: int) -> int:
    """Return how many of ``total`` weights make up ``sparsity``, rounded down; 0.29 of 100 is 29."""
    return int(sparsity * total + 1e-6)
