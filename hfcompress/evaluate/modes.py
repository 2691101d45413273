"""A model as it is while it is being measured: in eval mode, without gradients, fed on its own device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from hfcompress.structure.modes import eval_mode


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode and inference mode; on leaving, every module gets its own training flag back."""
    with eval_mode(model), torch.inference_mode():
        yield


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating point parameter or buffer."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())


def on_device(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch on the model's device; floating inputs (pixels, features) in the model's dtype."""
    device, dtype = device_of(model), dtype_of(model)
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() and name != "labels" else None)
        for name, tensor in batch.items()
    }


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model derives its decoder's input from the labels."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
