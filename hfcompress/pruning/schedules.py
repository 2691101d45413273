"""How sparsity grows with the step: pure functions, so that resuming needs no state."""

from __future__ import annotations

from collections.abc import Callable

DEFAULT_UPDATES = 50


def cubic_sparsity(step: int, first: int, last: int, target: float) -> float:
    """Fast at first, flat at the end (Zhu and Gupta, arXiv 1710.01878, equation 1)."""
    return target * (1 - _remaining(step, first, last) ** 3)


def linear_sparsity(step: int, first: int, last: int, target: float) -> float:
    """Grow by the same share of weights at every step."""
    return target * (1 - _remaining(step, first, last))


def oneshot_sparsity(step: int, first: int, last: int, target: float) -> float:
    """Be dense until ``first``, and at the target with the step after it."""
    return target if step > first else 0.0


def constant_sparsity(step: int, first: int, last: int, target: float) -> float:
    """Be at the target from before the first step on, as when a sparse model is trained further."""
    return target


def _remaining(step: int, first: int, last: int) -> float:
    """Return the share of the ramp from ``first`` to ``last`` that is still to come, in [0, 1]."""
    if step >= last:
        return 0.0
    return 1 - max(0, step - first) / (last - first)


def ramp(schedule: str, start: float, end: float, max_steps: int) -> tuple[int, int]:
    """Return the steps between which the sparsity changes; the last one lies inside the run.

    start, end: shares of ``max_steps``.  A constant schedule is at its target at step 0; one-shot takes one step.
    """
    if schedule == "constant":
        return 0, 0
    first = int(start * max_steps)
    wished = first + 1 if schedule == "oneshot" else max(first + 1, round(end * max_steps))
    return first, min(wished, max_steps)


def last_update(step: int, first: int, last: int, frequency: int | None) -> int:
    """Return the last step up to ``step`` after which masks change, or ``first`` before any.

    frequency: steps between two changes; None makes DEFAULT_UPDATES of them over the ramp, which ends with one.
    """
    if step >= last:
        return last
    every = frequency or max(1, (last - first) // DEFAULT_UPDATES)
    return first + max(0, step - first) // every * every


SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {
    "cubic": cubic_sparsity,
    "linear": linear_sparsity,
    "oneshot": oneshot_sparsity,
    "constant": constant_sparsity,
}
