"""Patterns and selection: exact counts, ties, and what goes together."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hfcompress.pruning.patterns import (
    Blocks,
    NofM,
    block_scores,
    nofm_pruned,
    parse_pattern,
    pruned_by_pattern,
    spread_blocks,
)
from hfcompress.pruning.select import smallest


def _scores(kind: str, shape: tuple[int, int], seed: int = 0) -> Tensor:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return {
        "random": found,
        "ties": found.round(),
        "equal": torch.full(shape, -0.25),
        "zeros of both signs": torch.where(found > 0, 0.0, -0.0),
        "dead": found.masked_fill(found < 0, -torch.inf),
        "barred": found.masked_fill(found < 0, torch.inf),
    }[kind]


KINDS = ("random", "ties", "equal", "zeros of both signs", "dead", "barred")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "3:4", "1:2", "2:3", "5:16"])
def test_every_group_loses_its_smallest_and_no_more(text: str, kind: str) -> None:
    pattern = parse_pattern(text)
    assert isinstance(pattern, NofM)
    scores = _scores(kind, (5, 3 * pattern.group))
    groups = scores.view(-1, pattern.group)
    expected = torch.zeros_like(groups, dtype=torch.bool)
    order = groups.sort(dim=-1, stable=True).indices[:, : pattern.group - pattern.kept]
    expected.scatter_(1, order, True)
    assert torch.equal(nofm_pruned(scores, pattern), expected.view_as(scores))
    assert int(expected.sum()) == pytest.approx(pattern.sparsity * scores.numel())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["4x1", "1x4", "2x3", "4x12", "row"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_blocks_go_whole_smallest_mean_first(sparsity: float, text: str, kind: str) -> None:
    blocks = parse_pattern(text)
    assert isinstance(blocks, Blocks)
    scores = _scores(kind, (8, 12))
    pruned = pruned_by_pattern(scores, sparsity, blocks)
    rows, columns = blocks.rows, blocks.columns or 12
    means, marks = [], []
    for top, left in itertools.product(range(0, 8, rows), range(0, 12, columns)):
        inside = pruned[top : top + rows, left : left + columns]
        assert bool(inside.all()) or not bool(inside.any())
        means.append(float(scores[top : top + rows, left : left + columns].mean()))
        marks.append(bool(inside.any()))
    assert sum(marks) == int(sparsity * len(marks))
    if any(marks) and not all(marks):
        kept = min(mean for mean, marked in zip(means, marks) if not marked)
        assert max(mean for mean, marked in zip(means, marks) if marked) <= kept + 1e-6


def test_blocks_are_outputs_by_inputs() -> None:
    scores = torch.arange(12.0).view(4, 3)
    assert block_scores(scores, Blocks(4, 1)).tolist() == [[4.5, 5.5, 6.5]]
    assert block_scores(scores, Blocks(1, None)).flatten().tolist() == [1.0, 4.0, 7.0, 10.0]
    assert spread_blocks(torch.tensor([[True, False, True]]), Blocks(4, 1), 3).tolist() == [[True, False, True]] * 4
    assert pruned_by_pattern(scores, 0.5, Blocks(1, None)).all(1).tolist() == [True, True, False, False]
    assert nofm_pruned(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), NofM(2, 4)).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_pattern_exactly_the_asked_share_goes(kind: str) -> None:
    scores = _scores(kind, (10, 10))
    for sparsity in (0.0, 0.01, 0.29, 0.57, 0.999):
        pruned = pruned_by_pattern(scores, sparsity, None)
        assert int(pruned.sum()) == int(sparsity * 100 + 1e-6)
        if 0 < int(pruned.sum()) < 100:
            assert scores[pruned].max() <= scores[~pruned].min()


@pytest.mark.parametrize(
    ("text", "fits", "does_not"),
    [("2:4", (3, 8), (4, 6)), ("4x1", (8, 3), (6, 8)), ("1x4", (3, 8), (8, 6)), ("row", (3, 5), None)],
)
def test_pattern_says_which_shapes_it_divides(
    text: str, fits: tuple[int, int], does_not: tuple[int, int] | None
) -> None:
    assert parse_pattern(text).divides(*fits)
    assert does_not is None or not parse_pattern(text).divides(*does_not)


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2:0", "4x0", "x1", "rows", "", "2-4", "2:4:8", "-1:4", "2x-1"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"pattern '{text}'"):
        parse_pattern(text)


@pytest.mark.parametrize("kind", KINDS)
def test_smallest_equals_a_stable_sort_for_any_sign(kind: str) -> None:
    scores = [_scores(kind, shape, seed) for seed, shape in enumerate([(7, 13), (1, 1), (64, 2)])]
    flat = torch.cat([one.flatten() for one in scores])
    order = flat.sort(stable=True).indices
    for count in (-1, 0, 1, 91, 92, 150, flat.numel() - 1, flat.numel(), flat.numel() + 5):
        expected = torch.zeros(flat.numel(), dtype=torch.bool)
        expected[order[: max(count, 0)]] = True
        assert torch.equal(torch.cat([one.flatten() for one in smallest(scores, count)]), expected), count


def test_entries_that_weigh_more_never_exceed_the_count() -> None:
    scores = [_scores("random", (5, 4), 1), _scores("random", (3, 4), 2), _scores("ties", (2, 7), 3)]
    sizes = [3, 7, 2]
    total = sum(size * one.numel() for size, one in zip(sizes, scores))
    before = -1
    for count in range(0, total + 3):
        marked = smallest(scores, count, sizes)
        weight = sum(size * int(one.sum()) for size, one in zip(sizes, marked))
        assert before <= weight <= count
        assert weight > count - max(sizes) or weight == total
        kept = [one[~mark] for one, mark in zip(scores, marked)]
        gone = [one[mark] for one, mark in zip(scores, marked)]
        if weight and weight < total:
            assert max(float(one.max()) for one in gone if one.numel()) <= min(
                float(one.min()) for one in kept if one.numel()
            )
        before = weight


def test_scores_may_be_made_when_they_are_asked_for() -> None:
    stored = [_scores("ties", (6, 6), seed) for seed in range(3)]

    class Lazy:
        alive = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            for one in stored:
                yield one.clone()

    for mine, theirs in zip(smallest(Lazy(), 40), smallest(stored, 40)):
        assert torch.equal(mine, theirs)
