"""Tables of the documentation that are made from the measurements of the cards in ``model_cards/``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.row_names import slug
from hfcompress.evaluate import Measurement
from hfcompress.publish import load_facts
from hfcompress.publish.markdown import table as markdown_table
from hfcompress.publish.numbers import NOT_MEASURED, megabytes, metric, percent
from hfcompress.publish.sections import stages_markdown

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
RESULTS = ROOT / "benchmarks" / "results"
SEEDS = 3


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of text, set to the left; this Markdown takes bars inside of code as they are."""
    text = markdown_table(headers, rows, right_from=len(headers))
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace(r"\|", "|"), text)


def card_folders() -> list[Path]:
    """Return the folders of all cards."""
    return sorted(file.parent for file in CARDS.glob("*/measurements.json"))


def gallery(technique: str | None = None) -> str:
    """Return a line for each card in ``model_cards/``: what was done, what it saved and what it cost.

    technique: a kind of stage, or an option such as ``prune`` of any stage, that the card's recipe has.
    """
    rows = []
    for folder in card_folders():
        facts = load_facts(folder)
        if technique and technique not in _techniques(facts.recipe):
            continue
        first, before, after, name = facts.stages[0].measurement, facts.before, facts.after, facts.metric_names[0]
        stages = ", ".join(f"`{stage.name}`" for stage in facts.stages[1:])
        rows.append([
            _link(facts.name, folder), stages,
            f"{megabytes(first.bytes_on_disk)}, then {megabytes(after.bytes_on_disk)}", _quality(name, before, after),
            percent(1 - after.nonzero / first.nonzero), f"{_latency(before)}, then {_latency(after)}",
        ])  # fmt: skip
    if not rows:
        return "No model card of this repository shows it yet."
    return table(["model", "stages", "size on disk", "quality", "fewer non-zeros", "latency"], rows)


def effects() -> str:
    """Return a line for each stage of every card but plain fine-tuning, by technique: what it changed by itself."""
    rows = []
    for folder in card_folders():
        facts = load_facts(folder)
        for stage, before, after in zip(facts.recipe["stages"], facts.stages, facts.stages[1:]):
            ((kind, options),) = stage.items()
            if kind == "finetune":
                continue
            one, other = before.measurement, after.measurement
            was, now = (found.latency and found.latency.median_ms for found in (one, other))
            rows.append([
                _label(kind, options), _link(facts.name, folder), _change(one.bytes_on_disk, other.bytes_on_disk),
                _change(was, now), _quality(facts.metric_names[0], one, other),
            ])  # fmt: skip
    return table(["stage", "of the card", "size on disk", "latency", "quality"], sorted(rows))


def _label(kind: str, options: dict[str, Any]) -> str:
    """Name a stage by its kind, and by its method or what it prunes while it trains."""
    pruned = [f"`{name}`" for name in options if name.startswith("prune") and options[name]]
    bits = f", {options['bits']} bits" if "bits" in options else ""
    method = f" by `{options['method']}`{bits}" if "method" in options else ""
    return f"`{kind}`{method}" + (f" with {', '.join(pruned)}" if pruned else "")


def _change(before: float | None, after: float | None) -> str:
    if not before or after is None:
        return NOT_MEASURED
    change = f"{after / before - 1:+.0%}"
    return "0%" if change in ("+0%", "-0%") else change


def _quality(name: str, before: Measurement, after: Measurement) -> str:
    return f"{name}: {metric(name, before.metrics.get(name))}, then {metric(name, after.metrics.get(name))}"


def _link(name: str, folder: Path) -> str:
    return f"[{name}](cards/{folder.name}/index.md)"


def _latency(found: Measurement) -> str:
    return NOT_MEASURED if found.latency is None else f"{found.latency.median_ms:.3g} ms"


def _techniques(recipe: dict[str, Any]) -> set[str]:
    """Return the kinds of a recipe's stages and the names of their options."""
    return {name for stage in recipe.get("stages", []) for kind, options in stage.items()
            for name in (kind, *(options or {}))}  # fmt: skip


def measured(name: str) -> str:
    """Return the table of a card's stages."""
    return stages_markdown(load_facts(CARDS / name))


def one_shot() -> str:
    """Return the table of the kept rows of ``benchmarks/prune_oneshot.py``: seconds, memory and what is left."""
    rows = json.loads((RESULTS / "prune_oneshot.json").read_text(encoding="utf-8"))["rows"]
    lines = [
        [name, _number(row.get("seconds"), ".1f"), _number(row.get("peak_mib"), ",.0f"),
         f"{row['perplexity']:.2f}", percent(row["sparsity"])]
        for name, row in rows.items()
    ]  # fmt: skip
    return table(["row", "seconds", "peak memory, MiB", "perplexity", "zeros"], lines)


def quantized() -> str:
    """Return the table of the kept rows of ``benchmarks/quantize.py``, the smallest perplexity first."""
    files = (RESULTS / "quantize" / "rows").glob("*.json")
    rows = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    lines = [
        [name, _number(row.get("seconds"), ".1f"), _number(row.get("peak_mib"), ",.0f"),
         f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.2f}"]
        for name, row in sorted(rows.items(), key=lambda one: float(one[1]["perplexity"]))
    ]  # fmt: skip
    return table(["row", "seconds", "peak memory, MiB", "bits of a weight", "perplexity"], lines)


def trained(what: str) -> str:
    """Return the table of the kept rows of ``benchmarks/prune_sst2.py`` with all seeds.

    what: ``weights`` or ``structure``, that the rows lost.
    """
    speed = json.loads((RESULTS / "sst2/speed.json").read_text(encoding="utf-8"))["times"]
    lines = []
    for name, times in speed.items():
        files = sorted((RESULTS / "sst2/rows").glob(f"{slug(name)}-[0-9].json"))
        is_wanted = name == "dense" or ("heads" in name) == (what == "structure")
        if len(files) < SEEDS or not is_wanted:
            continue
        each = [100 * json.loads(file.read_text(encoding="utf-8"))["accuracy"] for file in files]
        lines.append(
            [name, *(f"{one:.2f}" for one in (mean(each), min(each), max(each))), *(f"{one:.2f}x" for one in times)]
        )
    return table(["row", "mean accuracy", "least", "most", "float32", "bfloat16"], lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
