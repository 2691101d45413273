"""Counting what bitsandbytes has stored, without the package."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor

from hfcompress.checkpoint.summary import QuantizationGroup

_STATE = ".quant_state.bitsandbytes__"
_ZEROS = {"nf4": (7,), "fp4": (0, 8)}  # the codes that stand for 0
_STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def bitsandbytes_group(options: Mapping[str, Any]) -> QuantizationGroup:
    """Return what a ``quantization_config`` of bitsandbytes says; what it does not name is quantized."""
    if options.get("load_in_8bit"):
        return QuantizationGroup(8, "LLM.int8", True, None, ("Linear",))
    return QuantizationGroup(4, options.get("bnb_4bit_quant_type", "fp4"), True, 64, ("Linear",))


def packed_kind(name: str, names: Container[str]) -> str | None:
    """Return the kind of 4-bit floats that a tensor holds two of in each byte; None for any other tensor."""
    return next((kind for kind in _ZEROS if name + _STATE + kind in names), None)


def is_companion(name: str, names: Container[str]) -> bool:
    """Tell whether a tensor belongs to a stored weight and holds no weights itself."""
    module, _, leaf = name.rpartition(".")
    if leaf in ("SCB", "weight_format"):
        return f"{module}.weight" in names
    return (leaf in _STATISTICS and module in names) or _STATE in name


def count_packed(read: Callable[[str], Tensor], name: str, kind: str) -> tuple[int, int]:
    """Return how many weights a tensor of 4-bit floats holds, and how many of them are not zero.

    read: gives the checkpoint's tensors by name.
    """
    facts = json.loads(bytes(read(name + _STATE + kind).tolist()))
    rows, columns = facts["shape"]
    stored = read(name).view(torch.uint8).flatten()
    zeros = sum(int((codes == zero).sum()) for codes in (stored >> 4, stored & 15) for zero in _ZEROS[kind])
    return rows * columns, rows * columns - zeros
