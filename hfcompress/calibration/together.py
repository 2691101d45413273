"""One forward pass per layer: all calibration batches in one call that compresses linear layers on its way.

Where every batch calls a layer with the same shapes, the calls are joined into one. When it comes to a linear layer,
the inputs are there for all tokens: they give its Hessian or another statistic, it is compressed, and the pass goes on
with what is there then. So the pass that calibrates a layer also sends the hidden states through the compressed one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.observe import TokenMasks
from hfcompress.calibration.record import LayerCall
from hfcompress.packed import PackedWeight
from hfcompress.structure.stack import LINEAR_TYPES

# What the outputs of all linear layers of a layer may take for all tokens; beyond it, batches go one by one.
MOST_BYTES = 1 << 30


def fits_joined(layer: nn.Module, tokens: int) -> bool:
    """Tell whether the activations of all calibration tokens may be held at once; packed or not, the answer is one."""
    bytes_per_token = 0
    for module in layer.modules():
        if isinstance(module, PackedWeight):
            bytes_per_token += max(module.rows, module.columns) * module.weight_scale.element_size()
        elif isinstance(module, LINEAR_TYPES) and isinstance(module.weight, Tensor):
            bytes_per_token += max(module.weight.shape) * module.weight.element_size()
    return tokens * bytes_per_token <= MOST_BYTES


def join_calls(calls: Sequence[LayerCall], sizes: Sequence[int]) -> LayerCall | None:
    """Return one call for all rows of several batches, or None where what they hand to the layer is too unlike.

    sizes: the rows of each batch.
    """
    try:
        args = _joined([call.args for call in calls], sizes)
        kwargs = _joined([call.kwargs for call in calls], sizes)
    except _UnlikeError:
        return None
    return LayerCall(args, kwargs, calls[0].by_keyword)


def first_rows(call: LayerCall, rows: int, count: int = 1) -> LayerCall:
    """Return a joined call of so many rows for the first ``count`` of them alone."""
    args, kwargs = (_first_rows(values, rows, count) for values in (call.args, call.kwargs))
    return LayerCall(args, kwargs, call.by_keyword)


def _first_rows(value: Any, rows: int, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[:count] if value.dim() and len(value) == rows else value
    if isinstance(value, Mapping):
        return {key: _first_rows(item, rows, count) for key, item in value.items()}
    return type(value)(_first_rows(item, rows, count) for item in value) if isinstance(value, (tuple, list)) else value


class _UnlikeError(Exception):
    """Batches differ in something that has no rows; never leaves this module."""


def _joined(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise _UnlikeError
    if isinstance(first, Tensor):
        return _joined_tensors(values, sizes)
    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            raise _UnlikeError
        return {key: _joined([value[key] for value in values], sizes) for key in first}
    if isinstance(first, (tuple, list)):
        if any(len(value) != len(first) for value in values):
            raise _UnlikeError
        return type(first)(_joined(items, sizes) for items in zip(*values))
    if any(value is not first and value != first for value in values):
        raise _UnlikeError
    return first


def _joined_tensors(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    first = tensors[0]
    if any(tensor.shape[1:] != first.shape[1:] or tensor.dtype != first.dtype for tensor in tensors):
        raise _UnlikeError
    if all(tensor.dim() and len(tensor) == size for tensor, size in zip(tensors, sizes)):
        # One row for all batches may be a view of many, such as rotary embeddings of positions.
        return torch.cat(list(tensors))
    # What has rows or heads of rows in one dimension, as alibi has in Bloom, is no batch's but its own.
    shared = first.dim() < 3 or len(first) == 1
    if shared and all(tensor is first or torch.equal(tensor, first) for tensor in tensors):
        return first
    raise _UnlikeError


def join_masks(masks: Sequence[TokenMasks], sizes: Sequence[int]) -> TokenMasks | None:
    """Return the masks of several batches as one, or None where they do not fit together."""
    try:
        return TokenMasks(*(_joined([getattr(mask, kind) for mask in masks], sizes) for kind in ("own", "context")))
    except _UnlikeError:
        return None
