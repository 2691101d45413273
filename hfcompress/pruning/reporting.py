"""Hand what a callback counted to the callbacks that report: TensorBoard, trackers, progress bars."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfcompress.callbacks import handler_of, peers_of
from hfcompress.publish.reporters import draw_layers_over_steps, send_picture, show_in_notebook


def log_shares(
    callback: TrainerCallback,
    name: str,
    overall: float,
    layers: Mapping[str, float],
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
) -> None:
    """Log ``NAME`` and ``NAME/LAYER`` beside what was logged last, and to what ``report_to`` names with a picture."""
    name = _name_among_peers(callback, name)
    logs = {name: overall, **{f"{name}/{layer}": share for layer, share in layers.items()}}
    if state.log_history:
        state.log_history[-1].update(logs)
    handler = handler_of(callback)
    if handler is None:
        return
    handler.on_log(args, state, control, logs)
    by_epoch = args.eval_strategy == IntervalStrategy.EPOCH
    show_in_notebook(handler.callbacks, {name: overall}, int(state.epoch or 0) if by_epoch else state.global_step)
    if layers and state.is_world_process_zero:
        draw = partial(draw_layers_over_steps, state.log_history, name)
        send_picture(handler.callbacks, f"{name}_of_each_layer", state.global_step, draw)


def has_logged(callback: TrainerCallback, name: str, state: TrainerState) -> bool:
    """Whether the shares of this step are in the log already."""
    name = _name_among_peers(callback, name)
    return any(name in logs and logs.get("step") == state.global_step for logs in state.log_history)


def _name_among_peers(callback: TrainerCallback, name: str) -> str:
    """Return the name itself; the first of several callbacks of a kind logs ``NAME_1``, the next ``NAME_2``."""
    peers = peers_of(callback)
    return f"{name}_{1 + [one is callback for one in peers].index(True)}" if len(peers) > 1 else name
