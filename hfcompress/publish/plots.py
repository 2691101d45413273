"""The picture of a run: size on disk against quality, one point for each stage."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from hfcompress.publish.facts import Facts
from hfcompress.publish.numbers import megabytes, metric

LOG_SCALE_FROM = 3.0
PICTURE_INCHES = (7.2, 4.4)
LOWER_IS_BETTER = frozenset({"perplexity", "loss", "eval_loss", "mse", "wer", "cer"})
_LINE, POINT, _FIRST, LAST, INK, GRID = "#9aa5b1", "#4c78a8", "#6b7785", "#d1495b", "#28323d", "#e6eaee"
# Where a label may stand beside its point: points to the right and upwards, and the side of the text that is there.
_OFFSETS = tuple(
    (dx, dy, side)
    for reach in (10, 18, 30, 46)
    for dx, dy, side in (
        (reach, reach * 0.7, "left"), (-reach, reach * 0.7, "right"), (reach, -reach * 0.7, "left"),
        (-reach, -reach * 0.7, "right"), (0, reach, "center"), (0, -reach, "center"),
    )
)  # fmt: skip
Point = tuple[str, float, float]


def plot_size_against_quality(facts: Facts, path: str | Path, metric_name: str | None = None) -> Path | None:
    """Draw one point per stage and an arrow from each stage to the next; PNG, 150 dots an inch.

    metric_name: the metric on the y axis; None is the first one.  Stages whose size or metric was not measured are
    left out; with fewer than two left there is no picture and the result is None.
    """
    path = Path(path)
    name = metric_name or next(iter(facts.metric_names), None)
    points = [] if name is None else _points(facts, name)
    if name is None or len(points) < 2:
        return None
    figure = Figure(figsize=PICTURE_INCHES, dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _style(axes, name, points)
    _draw_points(axes, points)
    axes.set_title(f"{facts.name}: size and quality after each stage", loc="left", fontsize=11, color=INK, pad=10)
    figure.draw_without_rendering()
    _draw_labels(figure, axes, name, points)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG whole or not at all.  The same figure gives the same bytes: no date and no version are in it."""
    with _atomic(path) as unfinished:
        figure.savefig(unfinished, format="png", metadata={"Software": None})
    return path


def _points(facts: Facts, name: str) -> list[Point]:
    """Return stage, size in MB and metric of each stage that has both as finite numbers."""
    return [
        (stage.name, stage.measurement.bytes_on_disk / 1e6, stage.measurement.metrics[name])
        for stage in facts.stages
        if stage.measurement.bytes_on_disk is not None and math.isfinite(stage.measurement.metrics.get(name, math.nan))
    ]


def _style(axes: Any, name: str, points: list[Point]) -> None:
    """Set scales, limits that leave room for labels, and quiet lines."""
    sizes, values = [size for _, size, _ in points], [value for _, _, value in points]
    axes.set_xlim(0, max(sizes) * 1.22)
    if name == "perplexity" and min(values) > 0 and max(values) / min(values) > LOG_SCALE_FROM:
        axes.set_yscale("log")
        margin = (max(values) / min(values)) ** 0.28
        axes.set_ylim(min(values) / margin, max(values) * margin)
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        spread = max(values) - min(values) or abs(values[0]) * 0.1 or 1.0
        axes.set_ylim(min(values) - 0.28 * spread, max(values) + 0.28 * spread)
    better = "lower" if name in LOWER_IS_BETTER else "higher"
    axes.set_xlabel("size on disk (MB)", color=INK)
    axes.set_ylabel(f"{name} ({better} is better)", color=INK)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0, which="both")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)


def _draw_points(axes: Any, points: list[Point]) -> None:
    for (_, x, y), (_, next_x, next_y) in pairwise(points):
        arrow = {"arrowstyle": "-|>", "color": _LINE, "linewidth": 1.4, "shrinkA": 6, "shrinkB": 6}
        axes.annotate("", (next_x, next_y), (x, y), arrowprops=arrow, zorder=2)
    for position, (_, x, y) in enumerate(points):
        colour = _FIRST if position == 0 else LAST if position == len(points) - 1 else POINT
        axes.scatter([x], [y], s=62, color=colour, edgecolor="white", linewidth=1.2, zorder=3)


def _obstacles(axes: Any, points: list[Point]) -> list[Bbox]:
    """Return boxes in pixels over every point and along every arrow, which labels must not cover."""
    dots = [tuple(axes.transData.transform((x, y))) for _, x, y in points]
    boxes = [Bbox.from_bounds(x - 12, y - 12, 24, 24) for x, y in dots]
    for (x, y), (next_x, next_y) in pairwise(dots):
        steps = max(1, int(math.hypot(next_x - x, next_y - y) / 8))
        for share in (step / steps for step in range(steps + 1)):
            boxes.append(Bbox.from_bounds(x + share * (next_x - x) - 5, y + share * (next_y - y) - 5, 10, 10))
    return boxes


def _draw_labels(figure: Figure, axes: Any, name: str, points: list[Point]) -> None:
    """Write each stage's name and numbers where they cover the least of what is already drawn."""
    taken, inside = _obstacles(axes, points), axes.get_window_extent()
    for stage, x, y in points:
        text = f"{stage}\n{megabytes(round(x * 1e6))}, {metric(name, y)}"
        label = axes.annotate(
            text, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8.5, color=INK, zorder=4,
            linespacing=1.25, va="center", path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
        corners = np.stack([box.get_points() for box in taken])
        best = min(_OFFSETS, key=lambda offset: _cost(figure, label, offset, corners, inside))
        _put(label, best)
        taken.append(label.get_window_extent(figure.canvas.get_renderer()).padded(3))  # type: ignore[attr-defined]


def _put(label: Any, offset: tuple[float, float, str]) -> None:
    dx, dy, side = offset
    label.set_position((dx, dy))
    label.set_horizontalalignment(side)
    label.set_verticalalignment("bottom" if dy > 0 else "top")


def _cost(figure: Figure, label: Any, offset: tuple[float, float, str], taken: np.ndarray, inside: Bbox) -> float:
    """Area in square pixels that a label at this offset would cover, plus a little for the distance.

    taken: (boxes, 2, 2), the lower left and the upper right corner of each.
    """
    _put(label, offset)
    box = label.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    covered = _shared_area(box, taken)
    outside = box.width * box.height - _shared_area(box, inside.get_points()[None])
    return 4 * covered + 16 * outside + abs(offset[0]) + abs(offset[1])


def _shared_area(one: Bbox, others: np.ndarray) -> float:
    sides = np.minimum(one.max, others[:, 1]) - np.maximum(one.min, others[:, 0])
    return float(sides.clip(min=0).prod(axis=1).sum())


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """Give a neighbouring file to write to, and move it to its name when that went well."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
