"""Another dropout than the model's config says, for as long as a training lasts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

from hfcompress.errors import ModelError

# What modules and configs call the probability of a dropout of their own: attention_dropout, dropout_rate, attn_pdrop.
# Layers that are skipped whole (layerdrop, drop_path) are another thing.
_NAME = re.compile("dropout|pdrop")


@contextmanager
def dropout_of(model: nn.Module, probability: float | None) -> Iterator[None]:
    """Set every dropout of a model, attention's too; on leaving, also by an error, all is as it was.

    probability: from 0, which switches dropout off, to below 1; None leaves the model alone.
    Raises ModelError for a model that has no dropout to set to more than 0.
    """
    found = [] if probability is None else _probabilities(model)
    if probability and not found:
        raise ModelError(f"{type(model).__name__} has no dropout that could be set to {probability:g}; take it out.")
    try:
        for owner, name, _ in found:
            setattr(owner, name, probability)
        yield
    finally:
        for owner, name, before in found:
            setattr(owner, name, before)


def _probabilities(model: nn.Module) -> list[tuple[Any, str, float]]:
    """Return (owner, attribute, value) of every dropout: in modules, and in configs, which some read as they run."""
    configs = {id(one): one for one in (getattr(module, "config", None) for module in model.modules())}
    owners = [*model.modules(), *(one for one in configs.values() if isinstance(one, PreTrainedConfig))]
    found = []
    for owner in owners:
        for name, value in vars(owner).items():
            named = name == "p" if isinstance(owner, _DropoutNd) else _NAME.search(name)
            if named and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.append((owner, name, value))
    return found
