"""How sparsity grows with the step: pure functions, so that resuming needs no state."""

from __future__ import annotations

from collections.abc import Callable


def cubic_sparsity(step: int, first: int, last: int, target: float) -> float:
    """Fast at first, flat at the end (Zhu and Gupta, arXiv 1710.01878, equation 1)."""
    return target * (1 - _remaining(step, first, last) ** 3)


def linear_sparsity(step: int, first: int, last: int, target: float) -> float:
    """Grow by the same share of weights at every step."""
    return target * (1 - _remaining(step, first, last))


def _remaining(step: int, first: int, last: int) -> float:
    """Return the share of the ramp from ``first`` to ``last`` that is still to come, in [0, 1]."""
    if step >= last:
        return 0.0
    return 1 - max(0, step - first) / (last - first)


SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {"cubic": cubic_sparsity, "linear": linear_sparsity}
