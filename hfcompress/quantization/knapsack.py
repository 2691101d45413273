"""The best choice of one thing of each group under a budget: the multiple-choice knapsack problem, solved exactly.

A price on cost (Lagrange's multiplier) bounds how good any choice can be, and with it the few choices per group that a
best one can contain. Among these, all sums of costs that are not beaten by a cheaper one are followed group by group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

HALVINGS = 100


class Item(NamedTuple):
    """One thing that a group may take.  cost: whole, above or equal 0.  loss: above or equal 0."""

    cost: int
    loss: float


class _State(NamedTuple):
    """What the first groups take.  excess: by how much it misses the bound."""

    cost: int
    loss: float
    excess: float
    taken: tuple[int, ...]


def best_choice(groups: Sequence[Sequence[Item]], budget: int) -> list[int]:
    """Return for each group the position of the item to take: of the smallest sum of losses, at most ``budget`` cost.

    Raises ValueError when even the cheapest items cost more.
    """
    least = [min(item.cost for item in group) for group in groups]
    if sum(least) > budget:
        raise ValueError(f"the cheapest choice costs {sum(least)}, more than the budget of {budget}")
    price = _price(groups, budget)
    known = _filled(groups, _at_price(groups, price), budget)
    excess = [_excess(group, price) for group in groups]
    bound = sum(min(item.loss + price * item.cost for item in group) for group in groups) - price * budget
    gap = sum(group[at].loss for group, at in zip(groups, known)) - bound
    gap += 1e-9 * (abs(bound) + gap)  # what sums of floats may be off
    states = [_State(0, 0.0, 0.0, ())]
    rest = sum(least)
    for group, above, cheapest in zip(groups, excess, least):
        rest -= cheapest
        found = [
            _State(state.cost + item.cost, state.loss + item.loss, state.excess + more, (*state.taken, at))
            for state in states
            for at, (item, more) in enumerate(zip(group, above))
            if state.excess + more <= gap and state.cost + item.cost + rest <= budget
        ]
        states = _unbeaten(found)
    return list(min(states, key=lambda state: (state.loss, state.cost)).taken)


def _price(groups: Sequence[Sequence[Item]], budget: int) -> float:
    """Return about the smallest price of cost at which what is best for each group by itself fits the budget."""
    low, high = 0.0, 1.0
    while _cost(groups, _at_price(groups, high)) > budget:
        low, high = high, 4 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _cost(groups, _at_price(groups, middle)) > budget:
            low = middle
        else:
            high = middle
    return high


def _at_price(groups: Sequence[Sequence[Item]], price: float) -> list[int]:
    def paid(item: Item) -> tuple[float, int]:
        return item.loss + price * item.cost, item.cost

    return [min(range(len(group)), key=lambda at: paid(group[at])) for group in groups]


def _cost(groups: Sequence[Sequence[Item]], chosen: Sequence[int]) -> int:
    return sum(group[at].cost for group, at in zip(groups, chosen))


def _excess(group: Sequence[Item], price: float) -> list[float]:
    """Return how much worse than the best at this price each item is."""
    paid = [item.loss + price * item.cost for item in group]
    return [one - min(paid) for one in paid]


def _filled(groups: Sequence[Sequence[Item]], chosen: list[int], budget: int) -> list[int]:
    """Spend what a choice leaves of the budget, where it saves most for its cost."""
    chosen, left = list(chosen), budget - _cost(groups, chosen)
    while True:
        better = [
            ((item.loss - group[chosen[at]].loss) / max(item.cost - group[chosen[at]].cost, 1), at, position)
            for at, group in enumerate(groups)
            for position, item in enumerate(group)
            if item.loss < group[chosen[at]].loss and item.cost - group[chosen[at]].cost <= left
        ]
        if not better:
            return chosen
        _, at, position = min(better)
        left -= groups[at][position].cost - groups[at][chosen[at]].cost
        chosen[at] = position


def _unbeaten(states: list[_State]) -> list[_State]:
    """Return the states that no other is both as cheap and as good as, cheapest first."""
    kept: list[_State] = []
    for state in sorted(states, key=lambda one: (one.cost, one.loss)):
        if not kept or state.loss < kept[-1].loss:
            kept.append(state)
    return kept
