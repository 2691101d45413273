"""Activation checkpointing, by the name that the installed Transformers has for it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

_NAME = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"


def checkpoint_activations(model: PreTrainedModel) -> None:
    getattr(model, f"{_NAME}_checkpointing_enable")()


def checkpointing(wanted: bool, **how: Any) -> dict[str, Any]:
    """Return the training arguments that say so."""
    return {f"{_NAME}_checkpointing": wanted, f"{_NAME}_checkpointing_kwargs": how}
