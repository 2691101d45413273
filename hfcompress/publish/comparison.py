"""Quality before and after: the difference, and how sure it is where single answers were kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from hfcompress.evaluate import Measurement, paired_bootstrap, unpack_hits
from hfcompress.publish.facts import Facts
from hfcompress.publish.markdown import code, table
from hfcompress.publish.numbers import NOT_MEASURED, metric, signed


@dataclass(frozen=True)
class Change:
    """One metric before and after; None is what was not measured.

    interval: of the difference, at 95%, by paired bootstrap over ``examples``.
    """

    name: str
    before: float | None
    after: float | None
    interval: tuple[float, float] | None = None
    examples: int | None = None

    @property
    def difference(self) -> float | None:
        """After minus before."""
        return None if self.before is None or self.after is None else self.after - self.before


def changes(facts: Facts) -> list[Change]:
    """Compare the first model that could do the task with the final one, metric by metric; none where they are one."""
    before, after = facts.before, facts.after
    found: list[Change] = []
    for name in facts.metric_names if before is not after else ():
        interval, examples = _interval(before, after, name)
        found.append(Change(name, before.metrics.get(name), after.metrics.get(name), interval, examples))
    return found


def _interval(before: Measurement, after: Measurement, name: str) -> tuple[tuple[float, float] | None, int | None]:
    """Return the interval of a difference, and over how many examples; None where rows hold several answers.

    Answers of one row (its tokens, its labels) depend on each other: drawn one by one they look surer than they are.
    """
    single = [(one.correct or {}).get(name) for one in (before, after)]
    if None in single:
        return None, None
    interval, examples = _bootstrap(*single)
    return (interval, examples) if after.rows in (None, examples) else (None, None)


@cache
def _bootstrap(before: str, after: str) -> tuple[tuple[float, float], int]:
    hits = unpack_hits(before), unpack_hits(after)
    return paired_bootstrap(*hits), len(hits[0])


def comparison_markdown(facts: Facts) -> str:
    """Return the table of metrics before and after; empty when there is only one model to speak of."""
    found = changes(facts)
    if not found:
        return ""
    headers = ["metric", "before", "after", "difference"]
    rows = [
        [change.name, metric(change.name, change.before), metric(change.name, change.after),
         signed(change.name, change.difference)]
        for change in found
    ]  # fmt: skip
    if any(change.interval for change in found):
        headers.append("95% interval of the difference")
        rows = [[*row, _between(change)] for row, change in zip(rows, found)]
    return table(headers, rows)


def _between(change: Change) -> str:
    if change.interval is None:
        return NOT_MEASURED
    return " to ".join(signed(change.name, bound) for bound in change.interval)


def comparison_note(facts: Facts) -> str:
    """Say which model "before" is, and where the interval is from."""
    note = f"Before is {code(facts.before_stage.name)}, after the reloaded checkpoint, on the same rows."
    counted = [change.examples for change in changes(facts) if change.examples is not None]
    if counted:
        note += (f" The interval is a paired bootstrap over the {counted[0]:,} examples (10,000 resamples): it is of "
                 "the choice of examples, not of the seed.")  # fmt: skip
    return note
