"""Packed layers in the place of dense ones, and dense ones back where they were."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import nn

from hfcompress.calibration.hessian import relative_error
from hfcompress.packed import PackedWeight, packed_twin
from hfcompress.quantization.grids import Rounded
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.report import QuantizedLinear
from hfcompress.quantization.rtn import Scale, round_to_nearest
from hfcompress.structure.offload import bring_in_, release_
from hfcompress.structure.stack import layer_stacks

Rows = list[QuantizedLinear]


def release_layer_(planned: Iterable[PlannedLinear], rows: Rows) -> None:
    """Give up the dense weights of a finished layer."""
    names = {row.name for row in rows}
    for one in planned:
        if one.name in names:
            release_(one.module)


def restore_(model: nn.Module, planned: Iterable[PlannedLinear]) -> None:
    """Put every dense layer back, and those that share its weight."""
    for one in planned:
        put_(model, one.name, one.module)
    for one in planned:
        for name, module in one.also.items():
            put_(model, name, module)


def put_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def by_layers(
    model: nn.Module, planned: Sequence[PlannedLinear], rounded: Callable[[PlannedLinear], QuantizedLinear]
) -> Iterator[tuple[str, Rows]]:
    """Quantize the linear layers of each layer of the stacks, one after another."""
    for stack in layer_stacks(model):
        for index in range(len(stack)):
            layer = f"{stack.name}.{index}"
            bring_in_(stack.layers[index])
            yield layer, [rounded(one) for one in planned if one.name.startswith(f"{layer}.")]


def round_one_(model: nn.Module, one: PlannedLinear, scale: Scale) -> QuantizedLinear:
    """Round a layer to nearest and put its packed form in its place."""
    started = time.perf_counter()
    packed = pack_(model, one, round_to_nearest(one.matrix, one.bits, one.group_size, one.symmetric, scale))
    error = relative_error(one.matrix, packed.dequantize())
    return row_of(one, error, None, 0, time.perf_counter() - started)


def empty_twin(one: PlannedLinear) -> PackedWeight:
    """Return a packed layer for a dense one, without its codes."""
    return packed_twin(one.module, one.bits, one.group_size, one.symmetric)


def pack_(model: nn.Module, one: PlannedLinear, rounded: Rounded) -> PackedWeight:
    """Put a packed layer in the place of a dense one, and of those that share its weight."""
    packed = empty_twin(one)
    packed.fill_(*rounded)
    put_(model, one.name, packed)
    for name, module in one.also.items():
        twin = packed_twin(module, one.bits, one.group_size, one.symmetric)
        twin.share_(packed)
        put_(model, name, twin)
    return packed


def row_of(one: PlannedLinear, error: float, damping: float | None, tokens: int, seconds: float) -> QuantizedLinear:
    """Return what the report says of a layer."""
    return QuantizedLinear(
        one.name, one.bits, one.group_size, one.requested_group_size, error, damping, tokens, seconds
    )
