"""How a model is run while it is only watched: no gradients, no dropout, no cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.structure.modes import eval_mode

Batch = Mapping[str, Any]
_beside: ContextVar[bool] = ContextVar("beside", default=False)


@contextmanager
def running_beside() -> Iterator[None]:
    """Mark a pass that a hook makes for itself in the middle of a training step: other hooks take nothing from it."""
    token = _beside.set(True)
    try:
        yield
    finally:
        _beside.reset(token)


def runs_beside() -> bool:
    """Tell whether the pass that is running is one of ``running_beside``."""
    return _beside.get()


@contextmanager
def watching(module: nn.Module) -> Iterator[None]:
    """Run a module in eval mode, without gradients and without a key/value cache; restore everything afterwards."""
    with running_still(module), torch.no_grad():
        yield


@contextmanager
def running_still(module: nn.Module) -> Iterator[None]:
    """Run a module in eval mode and without a key/value cache; restore both afterwards."""
    configs = {id(config): config for part in module.modules() if (config := getattr(part, "config", None))}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False)]
    try:
        for config in cached:
            config.use_cache = False
        with eval_mode(module):
            yield
    finally:
        for config in cached:
            config.use_cache = True


def run_batch(model: nn.Module, batch: Batch) -> Any:
    """Run a model on one batch, moved to the model's device, and return its output."""
    device = next(model.parameters()).device
    return model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})


def float_outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Run a model in eval mode and return its floating-point outputs."""
    with eval_mode(model):
        outputs = run_batch(model, batch)
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
