"""What our callbacks for the Trainer share: reading options, the model inside its wrappers, their neighbours."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hfcompress.errors import HFCompressError, did_you_mean

if TYPE_CHECKING:
    from transformers import Trainer

Options = TypeVar("Options")


def read_options(kind: str, options_type: type[Options], given: Mapping[str, Any]) -> Options:
    """Return a callback's options; kind: the callback's name.  Raises HFCompressError for a wrong name or value."""
    known = [field.name for field in dataclasses.fields(options_type)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise HFCompressError(
                f"{kind} has no option '{name}'. {did_you_mean(name, known)}Known: {', '.join(known)}."
            )
    try:
        return options_type(**given)
    except ValueError as error:
        raise HFCompressError(f"{kind}: {error}") from error


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside what compiles it or spreads it over devices."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)


def refuse_sharding(args: TrainingArguments, kind: str) -> None:
    """Raise HFCompressError when FSDP or DeepSpeed shards the weights."""
    from accelerate.state import DistributedType, PartialState

    # A launcher can choose sharding behind the arguments' back: `accelerate launch --use_fsdp`.
    launched = PartialState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if launched or args.deepspeed or getattr(args, "fsdp", None):
        raise HFCompressError(
            f"{kind} needs whole weights on every device, but FSDP or DeepSpeed shards them. "
            "Train with DDP or on one device."
        )


def refuse_split_weights(model: nn.Module, kind: str) -> None:
    """Raise HFCompressError when devices hold parts of the weights: tensor parallel, or sharded data parallel."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor

    split = next((name for name, weight in model.named_parameters() if isinstance(weight, DTensor)), None)
    if split is not None:
        raise HFCompressError(
            f"{kind} needs whole weights on every device, but '{split}' is split over a mesh of devices (DTensor). "
            "Load the model without distributed_config, tp_plan or fully_shard, and train with DDP or on one device."
        )


def handler_of(callback: TrainerCallback) -> CallbackHandler | None:
    """Return the handler that is calling this callback now, or None outside of events.

    Events get everything but the handler, and reporting callbacks come before a user's own in its list, so that what
    a callback adds to ``logs`` reaches none of them.  The handler is found as the object whose method is running.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, CallbackHandler) and any(one is callback for one in owner.callbacks):
            return owner
        frame = frame.f_back
    return None


def trainer_of(callback: TrainerCallback) -> Trainer | None:
    """Return the Trainer that is training with this callback now, found as its handler is, or None."""
    from transformers import Trainer

    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and any(one is callback for one in owner.callback_handler.callbacks):
            return owner
        frame = frame.f_back
    return None


def peers_of(callback: TrainerCallback) -> list[TrainerCallback]:
    """Return all callbacks of this one's kind in the same Trainer, in order and with itself."""
    handler = handler_of(callback)
    found = [] if handler is None else [one for one in handler.callbacks if isinstance(one, type(callback))]
    return found or [callback]
