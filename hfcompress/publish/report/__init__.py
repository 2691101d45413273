"""One HTML file that compares runs: a chart, a table, layers, and what two recipes have in common."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hfcompress.checkpoint.atomic import write_text
from hfcompress.errors import DataError, OutputError
from hfcompress.publish.comparison import changes
from hfcompress.publish.facts import Facts, load_facts
from hfcompress.publish.pictures import kept_rows, layer_panels
from hfcompress.publish.plots import LOWER_IS_BETTER
from hfcompress.publish.sharing import shared_name, shared_recipe, shared_text

# What a chart or a table can show of a stage, beside its metrics: title, and whether less is better.
COLUMNS: dict[str, tuple[str, bool]] = {
    "bytes_on_disk": ("size on disk (MB)", True),
    "parameters": ("parameters (M)", True),
    "nonzero": ("non-zeros (M)", True),
    "tokens_per_second": ("tokens/s", False),
    "latency_ms": ("latency, median (ms)", True),
    "latency_p95_ms": ("latency, 95th percentile (ms)", True),
    "peak_memory_bytes": ("peak memory (MB)", True),
    "seconds": ("time (s)", True),
}
_SCRIPTS = ("values.js", "charts.js", "page.js")
_MILLIONS = ("bytes_on_disk", "parameters", "nonzero", "peak_memory_bytes")


def write_report(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Compare finished runs in one self-contained HTML file, which loads nothing when it is looked at.

    folders: each with a ``measurements.json``.  Raises CheckpointError or DataError for a folder without facts, two
    runs of the same name, or none; OutputError for a file that cannot be written.
    """
    output = Path(output)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise OutputError(f"{output} cannot be the report: it is a folder, or lies in one that is not there.")
    if not folders:
        raise DataError("Name at least one folder with measurements.json to report on.")
    runs = [load_facts(folder) for folder in folders]
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        paths = [Path(folder).absolute() for folder in folders]
        told = next((told for depth in range(1, 4) if len({*(told := _last_parts(paths, depth))}) == len(paths)), None)
        if told is None:
            raise DataError(f"Two folders hold a run called {twice[0]}; name each folder once.")
        names = [f"{run.name} ({place})" for run, place in zip(runs, told)]
    write_text(output, render_report(dict(zip(names, runs))))
    return output


def _last_parts(paths: Sequence[Path], depth: int) -> list[str]:
    return ["/".join(path.parts[-depth:]) for path in paths]


def render_report(runs: dict[str, Facts]) -> str:
    """Return the page's HTML; runs by the name that the page gives them."""
    columns = {name: {"title": title, "less": less} for name, (title, less) in COLUMNS.items()}
    values = [run_values(name, run) for name, run in runs.items()]
    data = {"columns": columns, "metrics": _metrics(runs.values()), "runs": values}
    # No "<" stands in the data: "</script>" would end it, and "<!--" would hide what comes after.
    parts = {
        "title": html.escape(", ".join(runs)),
        "style": _part("style.css"),
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        "script": "\n".join(_part(name) for name in _SCRIPTS),
    }
    # In one pass, so that nothing in a run's names is taken for another part's place.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _part("page.html"))


def _metrics(runs: Any) -> dict[str, dict[str, Any]]:
    names = dict.fromkeys(name for run in runs for name in run.metric_names)
    return {name: {"title": name, "less": name in LOWER_IS_BETTER} for name in names}


def run_values(name: str, facts: Facts) -> dict[str, Any]:
    """Return what the page shows of one run, as plain values; null is what was not measured."""
    return {
        "name": name,
        "task": facts.task,
        "base": shared_name(facts.base_model),
        "stages": [_stage(facts, index) for index in range(len(facts.stages))],
        "changes": [
            {"metric": one.name, "before": _number(one.before), "after": _number(one.after), "interval": one.interval}
            for one in changes(facts)
        ],
        "kept": {label: {str(at): list(counts) for at, counts in cells.items()}
                 for label, cells in kept_rows(facts).items()},
        "layers": layer_panels(facts),
        "recipe": shared_recipe(facts.recipe) if facts.recipe else {},
    }  # fmt: skip


def _stage(facts: Facts, index: int) -> dict[str, Any]:
    stage = facts.stages[index]
    found = stage.measurement
    values: dict[str, Any] = {name: getattr(found, name, None) for name in COLUMNS}
    values["seconds"] = stage.seconds
    if found.latency is not None:
        values |= {"latency_ms": found.latency.median_ms, "latency_p95_ms": found.latency.p95_ms}
    for name in _MILLIONS:
        values[name] = None if values[name] is None else values[name] / 1e6
    metrics = {name: _number(value) for name, value in found.metrics.items()}
    summary = None if stage.summary is None else shared_text(stage.summary)
    return {"name": stage.name, "summary": summary, "values": {**values, **metrics}}


def _number(value: float | None) -> Any:
    """Return a metric as JSON takes it: a perplexity that overflows as the page's script reads it, NaN as nothing."""
    if value is None or math.isnan(value):
        return None
    return {"infinite": True} if value == math.inf else value if math.isfinite(value) else None


def _part(name: str) -> str:
    return resources.files("hfcompress.publish.report").joinpath(name).read_text(encoding="utf-8")
