"""The choice of bits is the best one there is: checked against all choices, and quick at the size of large models."""

from __future__ import annotations

import itertools
import random

import pytest

from hfcompress.quantization.knapsack import Item, best_choice


def random_groups(seed: int, count: int) -> list[list[Item]]:
    """Return groups as they come, or as layers are: alike sizes, four bits, a quarter of the error for each bit."""
    draw = random.Random(seed)
    if seed % 2:
        return [
            [Item(draw.randrange(20), draw.randrange(30) / 10) for _ in range(draw.randint(1, 4))]
            for _ in range(count)
        ]
    sizes, losses = draw.choices((960, 576, 3072, 1000), k=count), [draw.lognormvariate(0, 2) for _ in range(count)]
    return [[Item(size * bits, loss * 4.0**-bits) for bits in (2, 3, 4, 8)] for size, loss in zip(sizes, losses)]


@pytest.mark.parametrize("seed", range(60))
def test_no_other_choice_within_the_budget_loses_less(seed: int) -> None:
    groups = random_groups(seed, count=1 + seed % 7)
    every = list(itertools.product(*(range(len(group)) for group in groups)))
    costs = {chosen: sum(group[at].cost for group, at in zip(groups, chosen)) for chosen in every}
    losses = {chosen: sum(group[at].loss for group, at in zip(groups, chosen)) for chosen in every}
    for share in (0.0, 0.1, 0.35, 0.6, 1.0):
        budget = round(min(costs.values()) + share * (max(costs.values()) - min(costs.values())))
        found = tuple(best_choice(groups, budget))
        assert costs[found] <= budget
        least = min(losses[chosen] for chosen in every if costs[chosen] <= budget)
        assert losses[found] == pytest.approx(least, rel=1e-12, abs=1e-12)


def test_a_budget_below_the_cheapest_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="the cheapest choice costs 5, more than the budget of 4"):
        best_choice([[Item(2, 1.0), Item(3, 0.0)], [Item(3, 0.0)]], 4)


def test_a_model_of_many_layers_with_odd_sizes_is_solved_and_spends_what_it_may() -> None:
    """Sizes without a common divisor have as many sums as there are choices, 4 to the power of 320."""
    draw = random.Random(0)
    sizes = [draw.randrange(5_000, 90_000) for _ in range(320)]
    groups = [
        [Item(size * bits, draw.lognormvariate(0, 1) * size * 4.0**-bits) for bits in (2, 3, 4, 8)] for size in sizes
    ]
    budget = round(3.5 * sum(sizes))
    cost = sum(group[at].cost for group, at in zip(groups, best_choice(groups, budget)))
    assert 0.9999 * budget < cost <= budget
