"""What reporting callbacks do not take from logs: pictures for trackers, and columns of a notebook's table."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator
from transformers import TrainerCallback

from hfcompress.publish.plots import GRID, INK, LAST, POINT

Array = np.ndarray[Any, np.dtype[np.uint8]]


def send_picture(callbacks: Iterable[TrainerCallback], name: str, step: int, draw: Callable[[], Figure]) -> None:
    """Give a picture to every callback of a Trainer that can show one; it is drawn only if there is any."""
    ready = [(one, send) for one in callbacks for kind, (send, is_ready) in _SENDERS.items()
             if any(base.__name__ == kind for base in type(one).__mro__) and is_ready(one)]  # fmt: skip
    if ready:
        pixels = pixels_of(draw())
        for callback, send in ready:
            send(callback, name, pixels, step)


def pixels_of(figure: Figure) -> Array:
    """Draw a figure: (height, width, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_layers_over_steps(history: Sequence[Mapping[str, Any]], name: str) -> Figure:
    """Draw a log's values of layers as a heat map: a row for each layer, a column for each evaluation.

    history: ``state.log_history``, with entries ``NAME/LAYER`` beside ``step``; the colours go from 0 to 1.
    """
    entries = [one for one in history if any(key.startswith(f"{name}/") for key in one)]
    layers = list(dict.fromkeys(key for one in entries for key in one if key.startswith(f"{name}/")))
    values = [[one.get(layer, float("nan")) for one in entries] for layer in layers]
    figure = Figure(figsize=(7.2, 1.3 + 0.22 * len(layers)), dpi=110, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="YlGnBu", interpolation="nearest")
    axes.set_yticks(range(len(layers)), [layer.removeprefix(f"{name}/") for layer in layers])
    every = -(-len(entries) // 12)
    axes.set_xticks(range(0, len(entries), every), [str(one.get("step", "")) for one in entries[::every]])
    axes.set_xlabel("step", color=INK, fontsize=9)
    axes.set_title(f"{name.replace('_', ' ')} of each layer", loc="left", fontsize=10, color=INK)
    axes.tick_params(colors=INK, labelsize=7, length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, pad=0.015).outline.set_visible(False)
    return figure


def draw_losses_over_steps(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """Draw a log's losses over the steps, a panel for each.

    history: ``state.log_history``.  Evaluations are dots where the task loss is, which is what they measure.
    """
    figure = Figure(figsize=(7.2, 0.5 + 1.15 * len(names)), dpi=110, facecolor="white", layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names):
        axes.plot(*_logged(history, name), color=POINT, linewidth=1.4, marker=".", markersize=4, label="training")
        if name == "task_loss" and _logged(history, "eval_loss")[0]:
            axes.plot(
                *_logged(history, "eval_loss"), color=LAST, linestyle="", marker="o", markersize=5, label="eval_loss"
            )
            axes.legend(fontsize=7, frameon=False, labelcolor=INK)
        axes.set_title(name.replace("_", " "), loc="left", fontsize=9, color=INK)
        axes.grid(True, color=GRID, linewidth=0.8)
        axes.tick_params(colors=INK, labelsize=7, length=0)
        axes.spines[:].set_visible(False)
    panels[-1].set_xlabel("step", color=INK, fontsize=9)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _logged(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a value was logged, and the values."""
    found = [(one.get("step", 0), one[name]) for one in history if name in one]
    return [step for step, _ in found], [value for _, value in found]


def show_in_notebook(callbacks: Iterable[TrainerCallback], values: Mapping[str, float], epoch_or_step: int) -> None:
    """Put numbers beside the losses into the table that a notebook shows while a Trainer runs.

    epoch_or_step: what the table's first column counts.  The Trainer's own callback completes the line afterwards.
    """
    for callback in callbacks:
        tracker: Any = getattr(callback, "training_tracker", None)
        if getattr(tracker, "inner_table", None):
            columns = tracker.inner_table[0]
            unknown = dict.fromkeys(columns[1:], "No log") if len(tracker.inner_table) == 1 else {}
            shown = {name.replace("_", " ").capitalize(): f"{value:.4f}" for name, value in values.items()}
            columns += [name for name in shown if name not in columns]
            tracker.write_line({columns[0]: epoch_or_step, **unknown, **shown})


def _to_tensorboard(callback: Any, name: str, pixels: Array, step: int) -> None:
    callback.tb_writer.add_image(name, pixels, step, dataformats="HWC")
    callback.tb_writer.flush()


def _to_trackio(callback: Any, name: str, pixels: Array, step: int) -> None:
    trackio = callback._trackio
    trackio.log({name: trackio.Image(pixels, caption=f"step {step}"), "train/global_step": step})


def _to_notebook(callback: Any, name: str, pixels: Array, step: int) -> None:
    """Show a picture below the table of losses; the next of its name takes its place."""
    from IPython.display import Image, display  # there is one where there is a notebook

    file = io.BytesIO()
    imsave(file, pixels, format="png")
    shown = vars(callback.training_tracker).setdefault("pictures", {})
    if name in shown:
        shown[name].update(Image(file.getvalue()))
    else:
        shown[name] = display(Image(file.getvalue()), display_id=True)


_SENDERS: dict[str, tuple[Callable[..., None], Callable[[Any], bool]]] = {
    "TensorBoardCallback": (_to_tensorboard, lambda one: one.tb_writer is not None),
    "TrackioCallback": (_to_trackio, lambda one: one._initialized),
    "NotebookProgressCallback": (_to_notebook, lambda one: one.training_tracker is not None),
}
