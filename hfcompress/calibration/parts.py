"""Modules of a layer called by parts of the rows, so that what they hold on their way stays small.

Every module computes row by row when it does not train. For all calibration tokens at once, what a norm holds in
float32 or a feed-forward network between its linear layers would be the peak of all memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.structure.stack import LINEAR_TYPES

PART = 4096  # tokens


def small_modules(layer: nn.Module) -> list[nn.Module]:
    """Return the modules inside a layer that have no children and are not linear: norms, activations, dropout."""
    return [one for one in layer.modules() if not (isinstance(one, LINEAR_TYPES) or any(True for _ in one.children()))]


@contextmanager
def by_parts(modules: Iterable[nn.Module], rows: int) -> Iterator[None]:
    """Have modules that are called with nothing but a tensor of ``rows`` rows take it by parts."""
    modules = list(modules)
    with replaced_forwards((module, _in_parts(module.forward, rows)) for module in modules):
        yield


@contextmanager
def replaced_forwards(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Have modules answered for by other functions; their own come back at the end, whatever happens."""
    chosen = list(forwards)
    shadowed = [module.__dict__.get("forward") for module, _ in chosen]
    try:
        for module, forward in chosen:
            module.forward = forward
        yield
    finally:
        for (module, _), before in zip(chosen, shadowed):
            module.__dict__.pop("forward", None)
            if before is not None:
                module.forward = before


def only_states(args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Tensor | None:
    """Return what a module is called with where that is hidden states of ``rows`` rows and nothing else."""
    states = args[0] if len(args) == 1 and not kwargs else None
    fits = isinstance(states, Tensor) and states.dim() == 3 and len(states) == rows
    return states if fits else None


def split_rows(states: Tensor) -> tuple[Tensor, ...]:
    """Return views of about ``PART`` tokens each.  states: (rows, tokens, size)."""
    return states.split(max(1, PART // max(1, states.shape[1])))


def _in_parts(plain: Callable[..., Any], rows: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        states = only_states(args, kwargs, rows)
        if states is None:
            return plain(*args, **kwargs)
        output, start = None, 0
        for part in split_rows(states):
            done = plain(part)
            if len(part) == rows or not isinstance(done, Tensor) or len(done) != len(part):
                return plain(states) if len(part) < rows else done
            if output is None:
                output = torch.empty(rows, *done.shape[1:], dtype=done.dtype, device=done.device)
            output[start : start + len(part)] = done
            start += len(part)
        return output

    return forward
