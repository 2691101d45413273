"""Reads what modules inside a model hand on, by hooks that are there during one forward only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hfcompress.errors import ModelError
from hfcompress.structure.running import runs_beside


@dataclass(frozen=True, eq=False)
class Tap:
    """The output of one module of a model, or some features of it.

    module: full name.  features: indices into the last dimension, in the order in which they are wanted; None is all.
    decoder: the output belongs to the decoder's tokens of an encoder-decoder.
    """

    module: str
    features: Tensor | None = None
    decoder: bool = False


def name_of(model: nn.Module, part: nn.Module) -> str:
    """Return the full name of a module of a model."""
    return next(name for name, module in model.named_modules() if module is part)


def is_compiled(model: nn.Module) -> bool:
    """Tell whether ``compile`` was called on a model or a part of it: what runs then may call no new hooks."""
    return any(module._compiled_call_impl is not None for module in model.modules())


@contextmanager
def tapped(model: nn.Module, taps: Iterable[Tap]) -> Iterator[dict[Tap, Tensor]]:
    """Give a dict that fills with each tap's output, (rows, tokens, features), while the model runs.

    Of a module that runs several times the first output is kept.
    """
    outputs: dict[str, Tensor] = {}
    found = _Found(outputs)
    handles = []
    try:
        for tap in taps:
            found.taps.append(tap)
        for name in {tap.module for tap in found.taps}:
            handles.append(model.get_submodule(name).register_forward_hook(_keeper(outputs, name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keeper(outputs: dict[str, Tensor], name: str) -> Any:
    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        if not runs_beside():
            outputs.setdefault(name, output if isinstance(output, Tensor) else output[0])

    return keep


class _Found(dict[Tap, Tensor]):
    """Looks a tap's tensor up when it is asked for, after the forward."""

    def __init__(self, outputs: dict[str, Tensor]) -> None:
        self.outputs = outputs
        self.taps: list[Tap] = []

    def __missing__(self, tap: Tap) -> Tensor:
        if tap.module not in self.outputs:
            raise ModelError(f"Module {tap.module} did not run in this forward, so there is nothing to compare.")
        output = self.outputs[tap.module]
        return output if tap.features is None else output[..., tap.features.to(output.device)]
