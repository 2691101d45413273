"""The pictures of single layers: what was kept of them, and their bits, sparsity and error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hfcompress.publish.facts import Facts
from hfcompress.publish.plots import GRID, INK, LAST, POINT, save_figure

_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")
_WIDTH = 7.2
_CHARACTERS, _NUMBERS = 130, 40  # of small letters, and of layers' numbers, what has room in a row
DARK = 5  # bits whose colour is too dark for dark letters
Cells = dict[int, tuple[int, int]]
Points = list[tuple[int, float]]


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a module's name names first, None where it names none."""
    found = _NUMBER.search(name)
    return int(found.group(1)) if found else None


def kept_rows(facts: Facts) -> dict[str, Cells]:
    """Return for each kind of unit, and each place in a layer that has it, (before, after) by the layer's number."""
    rows: dict[str, Cells] = {}
    for units, blocks in facts.structure.items():
        if units == "key_value_heads" and blocks == facts.structure.get("heads"):
            continue  # every query head has its own key/value head, so this says the same again
        places = {_NUMBER.sub(".N", block, count=1) for block in blocks}
        for block, counts in blocks.items():
            layer = layer_of(block)
            if layer is not None:
                place = _NUMBER.sub(".N", block, count=1)
                label = units.replace("_", " ") + (f", {place}" if len(places) > 1 else "")
                rows.setdefault(label, {})[layer] = (counts[0], counts[1])
    return rows


def plot_kept(facts: Facts, path: Path) -> Path | None:
    """Draw what ``draw_kept`` does for a run; None where nothing was removed."""
    rows = kept_rows(facts)
    return draw_kept(rows, facts.name, path) if rows else None


def draw_kept(rows: dict[str, Cells], name: str, path: Path) -> Path:
    """Draw a heat map of kept heads and neurons: a row for each kind, a column for each layer.

    rows: by kind, (before, after) for each layer's number.
    """
    layers = sorted({layer for cells in rows.values() for layer in cells})
    figure = Figure(figsize=(_WIDTH, 1.25 + 0.42 * len(rows)), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    size = 8.5 if len(layers) <= 12 else min(5.5, 400 / len(layers))
    shares = [[_share(cells.get(layer)) for layer in layers] for cells in rows.values()]
    image = axes.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="YlGnBu")
    for row, cells in enumerate(rows.values()):
        longest = max(len(f"{kept:,}") for _, kept in cells.values())
        upright = len(layers) <= 12 or longest * len(layers) <= _CHARACTERS
        for column, layer in enumerate(layers):
            if layer in cells:
                dark = _share(cells[layer]) > 0.6
                axes.text(column, row, f"{cells[layer][1]:,}", ha="center", va="center", fontsize=size,
                          rotation=0 if upright else 90, color="white" if dark else INK)  # fmt: skip
    before = {label: max(one for one, _ in cells.values()) for label, cells in rows.items()}
    axes.set_yticks(range(len(rows)), [f"{label} (of {before[label]:,})" for label in rows])
    _number_columns(axes, layers)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{name}: what each layer kept", loc="left", fontsize=11, color=INK, pad=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.015)
    bar.set_ticks([0, 0.5, 1], labels=["0%", "50%", "100%"])
    bar.ax.tick_params(colors=INK, labelsize=8, length=0)
    bar.outline.set_visible(False)
    return save_figure(figure, path)


def _number_columns(axes: Any, layers: Sequence[int]) -> None:
    """Write the layers' numbers below their columns, as many of them as have room."""
    every = -(-len(layers) // _NUMBERS)
    axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set_xlabel("layer", color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8.5 if len(layers) <= 12 else 6.5, length=0)


def _share(counts: tuple[int, int] | None) -> float:
    return float("nan") if counts is None else counts[1] / counts[0] if counts[0] else 0.0


def bits_rows(facts: Facts) -> dict[str, dict[int, int]]:
    """Return for each kind of quantized linear layer the bits by the layer's number; empty where all have the same."""
    rows: dict[str, dict[int, int]] = {}
    for row in facts.quantization_report:
        layer = layer_of(row["name"])
        if layer is not None and row.get("bits"):
            rows.setdefault(_NUMBER.sub(".N", row["name"], count=1), {})[layer] = row["bits"]
    different = len({bits for cells in rows.values() for bits in cells.values()}) > 1
    stacks = {place.partition(".N.")[0] for place in rows}
    short = {place: place.partition(".N.")[2] if len(stacks) == 1 else place for place in rows}
    return {short[place]: cells for place, cells in rows.items()} if different else {}


def plot_bits(facts: Facts, path: Path) -> Path | None:
    """Draw the bits that were chosen for each layer, a row for each kind; None where all have the same."""
    rows = bits_rows(facts)
    if not rows:
        return None
    layers = sorted({layer for cells in rows.values() for layer in cells})
    figure = Figure(figsize=(_WIDTH, 1.0 + 0.27 * len(rows)), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    size = min(8.5, 440 / len(layers))  # a digit has to fit into a column
    shown = [[cells.get(layer, float("nan")) for layer in layers] for cells in rows.values()]
    axes.imshow(shown, aspect="auto", vmin=0, vmax=8, cmap="YlGnBu")
    for row, cells in enumerate(rows.values()):
        for column, layer in enumerate(layers):
            if layer in cells:
                color = "white" if cells[layer] > DARK else INK
                axes.text(column, row, str(cells[layer]), ha="center", va="center", fontsize=size, color=color)
    axes.set_yticks(range(len(rows)), list(rows))
    _number_columns(axes, layers)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{facts.name}: bits of a weight's code", loc="left", fontsize=11, color=INK, pad=8)
    return save_figure(figure, path)


def layer_panels(facts: Facts) -> dict[str, Points]:
    """Return what is drawn of each layer: bits and zeros, if there are any, and errors of single linear layers."""
    stacks = {_NUMBER.sub(".N", one["name"], count=1) for one in facts.layers}
    panels: dict[str, Points] = {}
    if len(stacks) == 1:
        counted = [(layer_of(one["name"]) or 0, one) for one in facts.layers if one["parameters"]]
        panels["bits per weight"] = [(at, 8 * one["bytes"] / one["parameters"]) for at, one in counted]
        if any(one["nonzero"] < 0.999 * one["parameters"] for _, one in counted):  # a few zeros are no picture
            panels["sparsity"] = [(at, 1 - one["nonzero"] / one["parameters"]) for at, one in counted]
    pruned = {f"pruning error, {stage}" if stage else "pruning error": rows
              for stage, rows in facts.pruning_reports.items()}  # fmt: skip
    for title, report in (*pruned.items(), ("quantization error", facts.quantization_report)):
        errors = [(layer_of(row["name"]), row.get("relative_error")) for row in report]
        points = [(at, error) for at, error in errors if at is not None and error is not None]
        if points:
            panels[title] = points
    return panels


def plot_layers(facts: Facts, path: Path) -> Path | None:
    """Draw bits, sparsity and relative error over the layers, a panel for each that is known; None without layers."""
    panels = layer_panels(facts)
    if not panels:
        return None
    figure = Figure(figsize=(_WIDTH, 0.7 + 1.35 * len(panels)), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    drawn = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, points) in zip(drawn, panels.items()):
        _draw_panel(axes, title, points)
    drawn[0].set_title(f"{facts.name}: the layers of the final model", loc="left", fontsize=11, color=INK, pad=8)
    drawn[-1].set_xlabel("layer", color=INK, fontsize=9)
    drawn[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return save_figure(figure, path)


def _draw_panel(axes: Any, title: str, points: Sequence[tuple[int, float]]) -> None:
    """Draw a value for each layer as bars; several, one for each linear layer, as dots."""
    layers, values = [at for at, _ in points], [value for _, value in points]
    if len(set(layers)) == len(layers):
        axes.bar(layers, values, width=0.7, color=POINT)
    else:
        axes.scatter(layers, values, s=14, color=LAST, alpha=0.75, linewidth=0)
    axes.set_ylim(0, (1.0 if title == "sparsity" else max(values) * 1.15) or 1.0)
    axes.set_ylabel(title.replace(", ", "\n"), color=INK, fontsize=9)
    axes.grid(True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8.5, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
