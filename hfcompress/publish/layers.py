"""The tables of single layers: what the checkpoint holds, and what pruning and quantization did to each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median
from typing import Any

from hfcompress.publish.facts import Facts
from hfcompress.publish.markdown import code, table
from hfcompress.publish.numbers import NOT_MEASURED, megabytes, millions, percent
from hfcompress.publish.pictures import kept_rows, layer_of

_QUANTIZED = {
    "name": "layer", "bits": "bits", "group_size": "group size", "relative_error": "relative error",
    "damping": "damping", "tokens": "calibration tokens", "seconds": "seconds",
}  # fmt: skip
_BLOCK = re.compile(r"^(.*?\.\d+)\..*$")  # a layer of a stack, and what is inside
_EXPERT = re.compile(r"(\.experts\.)\d+(\.)")
_PRUNED = {
    "name": "layer", "sparsity": "zeros", "relative_error": "relative error", "damping": "damping",
    "tokens": "calibration tokens", "seconds": "seconds",
}  # fmt: skip


def layers_markdown(facts: Facts) -> str:
    """Return a row for each layer of the final model; empty when nothing was counted."""
    if not facts.layers:
        return ""
    kept = kept_rows(facts) if len({one["name"].rpartition(".")[0] for one in facts.layers}) == 1 else {}
    rows = [
        [one["name"], millions(one["parameters"]), percent(1 - one["nonzero"] / one["parameters"]),
         f"{8 * one['bytes'] / one['parameters']:.2f}", megabytes(one["bytes"]),
         *(_of(cells.get(layer_of(one["name"]) or 0)) for cells in kept.values())]
        for one in facts.layers if one["parameters"]
    ]  # fmt: skip
    return table(["layer", "parameters", "zeros", "bits per weight", "size", *(f"kept {one}" for one in kept)], rows)


def _of(counts: tuple[int, int] | None) -> str:
    return NOT_MEASURED if counts is None else f"{counts[1]:,} of {counts[0]:,}"


def linear_reports(facts: Facts) -> list[dict[str, Any]]:
    """Return title, summary, count and table of each report on linear layers that there is."""
    found = []
    for title, columns, rows in (
        *((_titled("Pruning", stage), _PRUNED, rows) for stage, rows in facts.pruning_reports.items()),
        (_titled("Quantization"), _QUANTIZED, facts.quantization_report),
    ):
        if rows:
            names = [name for name in columns if any(name in row for row in rows)]
            lines = [[_cell(row, name) for name in names] for row in experts_together(rows)]
            shown = table([columns[name] for name in names], lines)
            tuned = _tuned(facts.tuning) if rows is facts.quantization_report else ""
            summary = _summary(rows) + _learnt(rows) + tuned
            found.append({"title": title, "summary": summary, "count": len(rows), "table": shown})
    return found


def _titled(what: str, stage: str = "") -> str:
    return f"{what} error of each layer" + (f" in the stage {code(stage)}" if stage else "")


def experts_together(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows, with one for the same matrix of all experts of a layer: mean error, range of tokens, seconds.

    Its name has a ``*`` for the expert and says how many there are.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        name = _EXPERT.sub(r"\1*\2", row["name"])
        groups.setdefault((name, row.get("bits"), row.get("group_size")), []).append(row)
    return [_together(name, alike) if len(alike) > 1 else alike[0] for (name, *_), alike in groups.items()]


def _together(name: str, alike: Sequence[dict[str, Any]]) -> dict[str, Any]:
    values = {key: [row[key] for row in alike if row.get(key) is not None] for key in alike[0]}
    errors, damping, tokens = (values.get(key, []) for key in ("relative_error", "damping", "tokens"))
    return {
        **alike[0],
        "name": f"{name} ({len(alike)} experts)",
        "relative_error": sum(errors) / len(errors) if errors else None,
        "damping": max(damping, default=None),
        "tokens": f"{min(tokens):,} to {max(tokens):,}" if any(tokens) else 0,
        "seconds": sum(values.get("seconds", [])),
    }


def _summary(rows: tuple[dict[str, Any], ...]) -> str:
    errors = [(row["relative_error"], row["name"]) for row in rows if row.get("relative_error") is not None]
    if not errors:
        return f"Relative errors: {NOT_MEASURED}."
    low, high = min(errors), max(errors)
    what = "output on the calibration data (of its weight, without such data)"
    if all(map(_is_of_weight, rows)):
        what = "weight"
    return (
        f"Relative error of a layer's {what}: from {low[0]:.4f} ({code(low[1])}) to {high[0]:.4f} ({code(high[1])})."
    )


def _learnt(rows: Sequence[dict[str, Any]]) -> str:
    """Say what gradient steps on codes did to the layers that the rows' linear layers are in; nothing without any."""
    found = {
        _BLOCK.sub(r"\1", row["name"]): row for row in rows if row.get("output_error_before") is not None
    }  # the linear layers of a layer all say the same of it
    if not found:
        return ""
    before, after = (median(row[f"output_error_{when}"] for row in found.values()) for when in ("before", "after"))
    return (
        f" Then rounding was learnt from what whole layers give, in {len(found):,} of them: on calibration rows that "
        f"no such step saw, the error of a layer's hidden states, as a share of these, went from {before:.4f} to "
        f"{after:.4f} in the median. The errors of single linear layers are those before that."
    )


def _tuned(tuning: dict[str, Any]) -> str:
    """Say what gradient steps on all scales did after that; nothing where there were none."""
    if not tuning:
        return ""
    nats = " nats" * (tuning["measure"] == "KL divergence")
    taken = "were kept" if tuning["kept"] else "were dropped again"
    return (
        f" Then {tuning['steps']:,} gradient steps tuned all scales and {taken}: on calibration rows that neither "
        f"they nor the layers saw, the {tuning['measure']} from the dense model went from {tuning['before']:.4f} to "
        f"{tuning['after']:.4f}{nats} a token."
    )


def _is_of_weight(row: dict[str, Any]) -> bool:
    """Tell whether no Hessian weighed the error of a quantized layer, as none does of SmoothQuant or of RTN."""
    return "bits" in row and row.get("damping") is None and row.get("scaled") is None


def _cell(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "row" if name == "group_size" else NOT_MEASURED if name == "relative_error" else "none"
    if name in ("relative_error", "damping"):
        return f"{value:.4f}" if name == "relative_error" else f"{value:g}"
    if name == "sparsity":
        return percent(value)
    return f"{value:,.1f}" if name == "seconds" else f"{value:,}" if isinstance(value, int) else str(value)
