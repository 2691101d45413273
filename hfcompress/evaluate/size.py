"""How many parameters a model in memory has, and how many of them are not zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hfcompress.packed import packed_layers
from hfcompress.packed.bitsandbytes import bitsandbytes_layers
from hfcompress.packed.bitsandbytes import nonzero as count_nonzero
from hfcompress.packed.bytes import byte_layers


@dataclass(frozen=True)
class StoredSize:
    """What a checkpoint holds.

    bytes_on_disk: of its weight files.  dtypes: in them, most weights first.  None for a model that was not stored.
    """

    parameters: int
    nonzero: int
    bytes_on_disk: int | None = None
    dtypes: tuple[str, ...] | None = None


def model_size(model: nn.Module) -> StoredSize:
    """Count a model's parameters; tied ones count once, a packed weight by its logical shape (out x in)."""
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    total = sum(parameter.numel() for parameter in parameters)
    nonzero = sum(int(torch.count_nonzero(parameter.detach())) for parameter in parameters)
    for module in {module.weight_packed.data_ptr(): module for module in packed_layers(model).values()}.values():
        total += module.rows * module.columns
        nonzero += module.nonzero()
    for one in byte_layers(model).values():
        total += one.weight.numel()
        nonzero += one.nonzero()
    for layer in bitsandbytes_layers(model).values():
        total += layer.out_features * layer.in_features
        nonzero += count_nonzero(layer)
    return StoredSize(total, nonzero)
