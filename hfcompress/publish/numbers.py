"""How measured numbers are written, the same way in tables, cards and plots; None is ``not measured``."""

from __future__ import annotations

import math

NOT_MEASURED = "not measured"
_DECIMALS = {"perplexity": 2}


def millions(count: int | None) -> str:
    """Write a count of parameters: ``134.5 M``; small models in thousands."""
    if count is None:
        return NOT_MEASURED
    return f"{count / 1e6:,.1f} M" if count >= 1_000_000 else f"{count / 1e3:,.1f} k"


def megabytes(size: int | None) -> str:
    """Write bytes as MB (10^6 bytes), without decimals from 1,000 MB on; small ones in kB."""
    if size is None:
        return NOT_MEASURED
    if size >= 1_000_000_000:
        return f"{size / 1e6:,.0f} MB"
    return f"{size / 1e6:,.1f} MB" if size >= 1_000_000 else f"{size / 1e3:,.1f} kB"


def metric(name: str, value: float | None) -> str:
    """Write a metric: perplexity with two decimals, shares such as accuracy with four; ``infinite`` on overflow."""
    if value is None:
        return NOT_MEASURED
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    return f"{value:,.{_DECIMALS.get(name, 4)}f}"


def signed(name: str, value: float | None) -> str:
    """Write a difference of a metric with its sign: ``+0.0012``, ``-3.10``."""
    text = metric(name, value)
    return text if value is None or not math.isfinite(value) or value < 0 else f"+{text}"


def milliseconds(value: float | None) -> str:
    """Write a latency with three digits: ``0.421 ms``, ``12.3 ms``, ``1,204 ms``."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f} ms"


def rate(value: float | None) -> str:
    """Write tokens a second: one decimal below a thousand, none above."""
    return NOT_MEASURED if value is None else f"{value:,.{1 if value < 1000 else 0}f}"


def count(value: int | None) -> str:
    """Write a whole number with a comma every three digits."""
    return NOT_MEASURED if value is None else f"{value:,}"


def percent(share: float) -> str:
    """Write a share as a percentage with one decimal."""
    return f"{100 * share:.1f}%"


def duration(seconds: float | None) -> str:
    """Write how long something took: ``0.8 s``, ``4 min 05 s``, ``2 h 10 min``."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def times(before: float, after: float) -> str:
    """Write the ratio of two numbers: ``5.1``, more decimals where the ratio is near one."""
    ratio = before / after
    return f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}"
