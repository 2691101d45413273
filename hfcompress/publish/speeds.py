"""The table of latencies: the median and the slow end of one call after each stage."""

from __future__ import annotations

from hfcompress.evaluate import Latency, Measurement
from hfcompress.publish.facts import Facts
from hfcompress.publish.markdown import table
from hfcompress.publish.numbers import NOT_MEASURED, milliseconds


def latency_markdown(facts: Facts) -> str:
    """Return median and 95th percentile of each stage, with what was timed where stages differ; empty without any."""
    if not any(stage.measurement.latency for stage in facts.stages):
        return ""
    rows = []
    for stage in facts.stages:
        found = stage.measurement.latency
        rows.append([stage.name, milliseconds(found.median_ms if found else None),
                     milliseconds(found.p95_ms if found else None), conditions(stage.measurement)])  # fmt: skip
    return table(["stage", "latency, median", "95th percentile", "of"], rows)


def latency_note(facts: Facts) -> str:
    """Say what a latency here is."""
    calls = sorted({stage.measurement.latency.calls for stage in facts.stages if stage.measurement.latency})
    if not calls:
        return f"Latency: {NOT_MEASURED}."
    counted = " or ".join(f"{count:,}" for count in calls)
    return f"Latency is of one call after a warm-up, over {counted} calls; 95 of 100 took no longer than the second."


def conditions(found: Measurement) -> str:
    """Say what was timed: of what, batch, length, threads and device."""
    latency = found.latency
    if latency is None:
        return NOT_MEASURED
    threads = (found.machine or {}).get("threads")
    parts = [_what(latency), f"{threads} threads" if threads else "", found.device or ""]
    return ", ".join(part for part in parts if part)


def _what(latency: Latency) -> str:
    if latency.length is None:
        return f"{latency.what}, batch {latency.batch}"
    if latency.what == "new token":
        return f"new token after {latency.length} of prompt, batch {latency.batch}"
    return f"{latency.what}, batch {latency.batch} x {latency.length} tokens"
