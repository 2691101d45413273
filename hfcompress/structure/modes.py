"""How a model is while it is looked at: in evaluation mode, in its own precision, by another attention function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig


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
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Let every attention of a model use the registered function of this name; on leaving all is as it was."""
    configs = {id(one): one for one in (getattr(m, "config", None) for m in model.modules())}
    known = [one for one in configs.values() if isinstance(one, PreTrainedConfig)]
    before = [config._attn_implementation for config in known]
    try:
        for config in known:
            config._attn_implementation = name
        yield
    finally:
        # Parents come first, and setting one sets its sub-configs: these then get their own value back.
        for config, own in zip(known, before):
            config._attn_implementation = own


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


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Keep gradients from a module's own parameters for a while."""
    wanting = [one for one in module.parameters() if one.requires_grad]
    try:
        for one in wanting:
            one.requires_grad_(False)
        yield
    finally:
        for one in wanting:
            one.requires_grad_(True)
