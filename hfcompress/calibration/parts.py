"""Modules of a layer called by parts of the rows, so that what they hold on their way stays small.

Every module computes row by row when it does not train. For all calibration tokens at once, what a norm holds in
float32, attention before its last linear layer, or a feed-forward network between its own would be the peak of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hfcompress.calibration.running import tensors_in
from hfcompress.structure.stack import LINEAR_TYPES

PART = 4096  # tokens
SMALL_PART = 512  # of modules without children: what they hold in float32 stays in the caches
HIDDEN = "hidden_states"


def small_modules(layer: nn.Module) -> list[nn.Module]:
    """Return the modules inside a layer that have no children and are not linear: norms, activations, dropout."""
    return [one for one in layer.modules() if not (isinstance(one, LINEAR_TYPES) or any(True for _ in one.children()))]


@contextmanager
def by_parts(modules: Iterable[nn.Module], rows: int) -> Iterator[None]:
    """Have modules that are called with hidden states of ``rows`` rows take them by parts, see ``RowCall``."""
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


def states_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what stands in a call where hidden states would."""
    return args[0] if args else kwargs.get(HIDDEN)


class RowCall:
    """A call of a module that gets hidden states, and beside them only what can be told apart into rows.

    states: the hidden states, (rows, tokens, size).
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor) -> None:
        self.args, self.kwargs, self.states = args, kwargs, states

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> RowCall | None:
        """Return the call, or None where it holds something that may have no rows, or rows of another kind."""
        states = states_in(args, kwargs)
        if not isinstance(states, Tensor) or states.dim() != 3 or len(states) != rows or not _is_plain((args, kwargs)):
            return None
        others = [one for one in tensors_in((args, kwargs)) if one is not states]
        # Where there are as many tokens as rows, a tensor may have either.
        sizes = {1} if rows == states.shape[1] else {1, rows}
        fits = all(one.dim() > 1 and len(one) in sizes for one in others)
        return cls(args, kwargs, states) if fits else None

    def run(self, forward: Callable[..., Any], rows: slice) -> Any:
        """Call a module's forward for some of the rows."""
        args, kwargs = self._part((self.args, self.kwargs), rows)
        return forward(*args, **kwargs)

    def _part(self, value: Any, rows: slice) -> Any:
        if isinstance(value, Tensor):
            return value[rows] if len(value) == len(self.states) else value
        if isinstance(value, dict):
            return {key: self._part(item, rows) for key, item in value.items()}
        return type(value)(self._part(item, rows) for item in value) if isinstance(value, (tuple, list)) else value


def _is_plain(value: Any) -> bool:
    """Tell whether nothing but tensors, numbers and texts is in nested tuples, lists and dicts."""
    if type(value) in (tuple, list):
        return all(_is_plain(item) for item in value)
    if type(value) is dict:
        return all(_is_plain(item) for item in value.values())
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def row_parts(states: Tensor, tokens: int | None = None) -> list[slice]:
    """Return rows of about so many tokens each, ``PART`` by default, one part after the other.

    states: (rows, tokens, size).
    """
    size = max(1, (tokens or PART) // max(1, states.shape[1]))
    return [slice(start, min(start + size, len(states))) for start in range(0, len(states), size)]


def joined_rows(parts: Iterable[Tensor], rows: int, spent: Tensor | None = None) -> Tensor:
    """Return parts of so many rows as one tensor: in the place of ``spent`` where they fit there, or in a new one."""
    output, start = spent, 0
    for part in parts:
        form = (part.dtype, (rows, *part.shape[1:]))
        if output is None or not output.is_contiguous() or (output.dtype, output.shape) != form:
            output = part.new_empty(rows, *part.shape[1:])
        output[start : start + len(part)] = part
        start += len(part)
    assert output is not None
    return output


def states_and_rest(output: Any) -> tuple[Tensor, tuple[Any, ...] | None] | None:
    """Return the tensor that a module returned, and what beside it (None: nothing); None where that holds tensors."""
    if isinstance(output, Tensor):
        return output, None
    if (
        type(output) is tuple
        and output
        and isinstance(output[0], Tensor)
        and not any(True for _ in tensors_in(output[1:]))
    ):
        return output[0], output[1:]
    return None


def _in_parts(plain: Callable[..., Any], rows: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        call = RowCall.of(args, kwargs, rows)
        parts = [] if call is None else row_parts(call.states, SMALL_PART)
        if call is None or len(parts) == 1:
            return plain(*args, **kwargs)
        output = rest = None
        for part in parts:
            found = states_and_rest(call.run(plain, part))
            if found is None or len(found[0]) != part.stop - part.start:
                return plain(*args, **kwargs)
            done, rest = found
            if output is None:
                output = done.new_empty(rows, *done.shape[1:])
            output[part] = done
        return output if rest is None else (output, *rest)

    return forward
