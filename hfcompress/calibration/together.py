"""One forward pass per layer: all calibration batches in one call that compresses linear layers on its way.

Where every batch calls a layer with the same shapes, the calls are joined into one. When it comes to a linear layer,
the inputs are there for all tokens: they give its Hessian or another statistic, it is compressed, and the pass goes on
with what is there then. So the pass that calibrates a layer also sends the hidden states through the compressed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic

import torch
from torch import Tensor, nn

from hfcompress.calibration.observe import Observed, Statistic, TokenMasks, real_tokens
from hfcompress.calibration.record import LayerCall
from hfcompress.packed import PackedWeight
from hfcompress.structure.stack import LINEAR_TYPES

# Tokens of a product: what is held in float32 at once.
CHUNK = 4096
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
    if all(tensor is first or torch.equal(tensor, first) for tensor in tensors):
        return first
    raise _UnlikeError


def join_masks(masks: Sequence[TokenMasks], sizes: Sequence[int]) -> TokenMasks | None:
    """Return the masks of several batches as one, or None where they do not fit together."""
    try:
        return TokenMasks(*(_joined([getattr(mask, kind) for mask in masks], sizes) for kind in ("own", "context")))
    except _UnlikeError:
        return None


class JoinedPass(Generic[Observed]):
    """A forward pass of a layer in which groups of linear layers are compressed when their input is there.

    linears: those that are compressed.  groups: names that share an input.  compress: gets what a group sees, as the
    statistic of its inputs, and changes its linear layers or replaces them in the layer.
    """

    def __init__(
        self,
        layer: nn.Module,
        linears: Mapping[str, nn.Module],
        groups: Sequence[Sequence[str]],
        masks: TokenMasks,
        statistic: Statistic[Observed],
        compress: Callable[[Observed], None],
    ) -> None:
        self.layer, self.linears, self.masks = layer, linears, masks
        self.statistic, self.compress = statistic, compress
        self.group_of = {name: tuple(group) for group in groups for name in group}
        self.waiting = set(self.group_of.values())
        self.context: set[int] = set()

    def run(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Return the output of the compressed layer.  hidden: (rows, tokens, size), of all batches."""
        self.context = call.context_pointers()
        with self._waiting_for_inputs():
            return call.run(self.layer, hidden)

    @contextmanager
    def _waiting_for_inputs(self) -> Iterator[None]:
        """Have each linear layer compressed when it is called, and let the new one answer."""
        shadowed = {name: module.__dict__.get("forward") for name, module in self.linears.items()}
        try:
            for name, module in self.linears.items():
                module.forward = self._compressing(name, module, module.forward)
            yield
        finally:
            for name, module in self.linears.items():
                module.__dict__.pop("forward", None)
                if (before := shadowed[name]) is not None:
                    module.forward = before

    def _compressing(self, name: str, module: nn.Module, plain: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        def forward(inputs: Tensor) -> Tensor:
            group = self.group_of[name]
            if group in self.waiting:
                self.waiting.discard(group)
                self.compress(self._seen(group, inputs))
            now = self.layer.get_submodule(name)
            output: Tensor = plain(inputs) if now is module else now(inputs)
            return output

        return forward

    def _seen(self, group: tuple[str, ...], inputs: Tensor) -> Observed:
        rows = real_tokens(inputs, self.masks.context if inputs.data_ptr() in self.context else self.masks.own)
        total = self.statistic.empty(rows)
        for chunk in rows.split(CHUNK):
            self.statistic.add_(total, chunk)
        return self.statistic.result(group, self.statistic.finish_(total), len(rows))
