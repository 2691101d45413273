"""How a model is while it is looked at: in evaluation mode, and in its own precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode and the weights' own precision; on leaving, also by an error, all is as it was."""
    with training_flags_kept(model), _own_precision(model):
        model.eval()
        yield


@contextmanager
def training_flags_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its own training flag back on leaving, also by an error."""
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextmanager
def _own_precision(model: nn.Module) -> Iterator[None]:
    """Take off the autocast that mixed-precision training (Accelerate) leaves around ``forward`` for good."""
    wrapped = vars(model).get("forward")
    if wrapped is None or "_original_forward" not in vars(model):
        yield
        return
    model.forward = vars(model)["_original_forward"]
    try:
        yield
    finally:
        model.forward = wrapped
