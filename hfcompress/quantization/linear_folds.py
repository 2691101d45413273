"""Scales moved from a linear layer's inputs into the linear layer that makes them: values, ungated neurons.

Attention mixes values over tokens, a gate multiplies a neuron, ReLU passes it on: all of them pass a factor on too.
Which row of the linear layer before makes which column is read off the layer itself. Every linear layer's output is
replaced by random positive numbers, those of one are multiplied by powers of two that spell each row's number, and
the factors that arrive are read.  So grouped heads and any layout need no rule.  What else depends on the row
is tried out on data, as for norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.quantization.folding import EXACT, Changes, Fold, Run, changes_nothing, set_
from hfcompress.structure.stack import linear_weights_of

BASE = 8  # powers of two up to 2**7 are far from overflow in any dtype


@dataclass(frozen=True)
class LinearFold:
    """A linear layer, and the one that reads it.

    name: of the linear layer before, in the layer.  unit_of_column: (in,), its row that makes each of the reader's.
    """

    name: str
    producer: nn.Linear
    readers: dict[str, nn.Linear]
    unit_of_column: Tensor
    tolerance: float = EXACT

    @property
    def units(self) -> int:
        """How many rows the linear layer before has."""
        return self.producer.out_features

    def divide_(self, scale: Tensor, changes: Changes) -> Tensor:
        """Divide the rows, and the bias."""
        weight, bias = self.producer.weight, self.producer.bias
        set_(weight, (weight.detach().float() / scale.unsqueeze(1)).to(weight.dtype), changes)
        if bias is not None:
            set_(bias, (bias.detach().float() / scale).to(bias.dtype), changes)
        return scale


class LinearFolds:
    """Finds folds between linear layers; layers that are made alike are probed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[tuple[str, str, Tensor]]] = {}

    def __call__(self, layer: nn.Module, run: Run, wanted: set[str], readers: set[str]) -> list[Fold]:
        """Return the folds of some readers into linear layers that are ``wanted``.

        run: runs the layer and returns its output.
        """
        linears = {name: one for name, one in linear_weights_of(layer).items() if type(one) is nn.Linear}
        shapes = [(name, one.in_features, one.out_features) for name, one in linears.items()]
        kind = (type(layer), *shapes, *sorted(wanted), "read", *sorted(readers))
        if kind not in self._known:
            before, after = (
                {name: one for name, one in linears.items() if name in part} for part in (wanted, readers)
            )
            self._known[kind] = list(_pairs(layer, run, before, after))
        expected = run()
        found: dict[str, Fold] = {}
        for source, reader, units in self._known[kind]:
            fold = LinearFold(source, linears[source], {reader: linears[reader]}, units)
            if reader not in found and changes_nothing(fold, run, expected):
                found[reader] = fold
        return list(found.values())


def _pairs(
    layer: nn.Module, run: Run, producers: Mapping[str, nn.Linear], readers: Mapping[str, nn.Linear]
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the names of a linear layer and of one that its rows' factors reach, and the row of each column."""
    for after, reader in readers.items():
        for before, producer in producers.items():
            if before != after and producer.out_features and reader.in_features % producer.out_features == 0:
                units = _units(layer, run, producer, reader)
                if units is not None:
                    yield before, after, units


def _units(layer: nn.Module, run: Run, producer: nn.Linear, reader: nn.Linear) -> Tensor | None:
    """Return the row of ``producer`` that makes each column of ``reader``, None where one is not simply passed on."""
    rows = torch.arange(producer.out_features)
    plain = _arriving(layer, run, producer, reader, torch.ones(len(rows)))
    if plain is None or plain.shape[-1] != reader.in_features:
        return None

    def digits(sent: Tensor) -> Tensor | None:
        found = _arriving(layer, run, producer, reader, 2.0**sent)
        assert found is not None
        ratio = (found.float() / plain.float()).reshape(-1, plain.shape[-1])
        low, high = ratio.nan_to_num(torch.inf).amin(0), ratio.nan_to_num(-torch.inf).amax(0)
        power = low.log2()
        whole = (low == high) & (power == power.round()) & (power >= 0) & (power < BASE)
        return power.long() if bool(whole.all()) else None

    dependent = digits(torch.ones(len(rows)))
    if dependent is None or not bool((dependent == 1).all()):
        return None
    units, place = torch.zeros_like(dependent), 1
    while place < len(rows):
        digit = digits(rows // place % BASE)
        if digit is None:
            return None
        units, place = units + digit * place, place * BASE
    return units if int(units.max()) < len(rows) else None


class _ArrivedError(Exception):
    """Ends a pass when the reader is called; never leaves this module."""


def _arriving(layer: nn.Module, run: Run, producer: nn.Linear, reader: nn.Linear, factors: Tensor) -> Tensor | None:
    """Return what the reader gets when the outputs of ``producer`` are multiplied by factors, None if it is not run.

    Outputs of linear layers are the same random numbers in every pass.
    """
    random = torch.Generator().manual_seed(0)
    arrived: list[Tensor] = []

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        values = torch.rand(output.shape, generator=random) + 0.5
        values = values.to(output.device, output.dtype)
        return values * factors.to(values) if module is producer else values

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        arrived.append(args[0])
        raise _ArrivedError

    with _hooked(layer, replace, reader, stop):
        try:
            run()
        except _ArrivedError:
            return arrived[0]
    return None


@contextmanager
def _hooked(
    layer: nn.Module, replace: Callable[..., Tensor], reader: nn.Linear, stop: Callable[..., None]
) -> Iterator[None]:
    handles = [one.register_forward_hook(replace) for one in linear_weights_of(layer).values()]
    handles.append(reader.register_forward_pre_hook(stop))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
