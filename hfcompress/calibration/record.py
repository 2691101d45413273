"""How a model calls the layers of a stack, recorded in one cheap pass in which the layers do nothing.

Each layer's ``forward`` is replaced by a recorder that notes the call and hands the hidden states on unchanged. So
masks, rotary embeddings and encoder states of every layer are known without a table of architectures, and cost one
run of what surrounds the stack. Layers whose outputs hold more than hidden states (T5 hands a position bias from layer
to layer) are really run, so that the next layer gets what it would get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from hfcompress.calibration.attention import fast_attention
from hfcompress.calibration.running import Batch, run_batch, tensors_in, watching
from hfcompress.devices import unmap_unchanged
from hfcompress.errors import ModelError
from hfcompress.structure.stack import LayerStack

HIDDEN = "hidden_states"


@dataclass(frozen=True)
class LayerCall:
    """All that a model handed to one layer except the hidden states; tensors are shared with other layers' calls."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_keyword: bool

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Return the layer's hidden states for other hidden states than those recorded."""
        with fast_attention():
            if self.by_keyword:
                return hidden_of(layer(*self.args, **{HIDDEN: hidden}, **self.kwargs))
            return hidden_of(layer(hidden, *self.args, **self.kwargs))

    def context_pointers(self) -> set[int]:
        """Return the addresses of the tensors that the layer gets beside the hidden states, as encoder states are."""
        return {tensor.data_ptr() for tensor in tensors_in((self.args, self.kwargs))}


@dataclass
class RecordedBatch:
    """One batch on its way through a stack: the hidden states before the next layer, and every layer's call.

    whole: of all batches, where ``hidden`` is a part of such a tensor that nobody else has.
    """

    batch: Batch
    hidden: Tensor | None = None
    calls: dict[int, LayerCall] = field(default_factory=dict)
    whole: Tensor | None = None


class _StackDoneError(Exception):
    """Ends a forward pass once the stack's last layer was recorded; never leaves this module."""


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states in what a layer returned: a tensor, or the first item of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def _without_cache(value: Any) -> Any:
    return None if isinstance(value, Cache) else value


def _split(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, LayerCall]:
    kwargs = {key: _without_cache(value) for key, value in kwargs.items()}
    args = tuple(_without_cache(value) for value in args)
    if args and isinstance(args[0], Tensor):
        return args[0], LayerCall(args[1:], kwargs, by_keyword=False)
    if isinstance(kwargs.get(HIDDEN), Tensor):
        return kwargs.pop(HIDDEN), LayerCall(args, kwargs, by_keyword=True)
    raise ModelError(f"{name} is called without hidden states (first argument or '{HIDDEN}'); it cannot be replayed.")


class _Recorder:
    """Stands in for the layers of one stack during a forward pass."""

    def __init__(self, stack: LayerStack) -> None:
        self.stack = stack
        self.forwards: list[Callable[..., Any]] = [layer.forward for layer in stack.layers]
        self.current: RecordedBatch | None = None
        self.runs_layers: bool | None = None
        self.constant_rest: tuple[Any, ...] | None = None

    def call(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """Note a layer's call and return what the model needs to go on."""
        name = f"{self.stack.name}.{index}"
        hidden, call = _split(name, args, kwargs)
        assert self.current is not None
        if index in self.current.calls:
            raise ModelError(
                f"{name} runs more than once in a forward pass (its weights are shared in depth), so there is no "
                "single input to calibrate it on. Use a method that needs no calibration, such as RTN."
            )
        if not self.current.calls:
            self.current.hidden = hidden
        self.current.calls[index] = call
        if self.runs_layers is None:
            return self._learn_from(hidden, self.forwards[index](*args, **kwargs))
        if self.runs_layers:
            return self.forwards[index](*args, **kwargs)
        return hidden if self.constant_rest is None else (hidden, *self.constant_rest)

    def _learn_from(self, hidden: Tensor, output: Any) -> Any:
        """Look at one real output: can hidden states stand for it?"""
        self.constant_rest = None if isinstance(output, Tensor) else tuple(output)[1:]
        self.runs_layers = hidden_of(output).shape != hidden.shape or any(True for _ in tensors_in(self.constant_rest))
        return output

    def stop_when_done(self, module: nn.Module, args: Any) -> None:
        """End the pass at the first module that is called after the stack's last layer."""
        if self.current is not None and len(self.stack) - 1 in self.current.calls:
            raise _StackDoneError


@contextmanager
def _standing_in(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Put the recorder in the place of the stack's layers, and watch the modules around them."""
    inside = {module for layer in recorder.stack.layers for module in layer.modules()}
    handles = [
        module.register_forward_pre_hook(recorder.stop_when_done) for module in model.modules() if module not in inside
    ]
    shadowed = [layer.__dict__.get("forward") for layer in recorder.stack.layers]
    try:
        for index, layer in enumerate(recorder.stack.layers):
            layer.forward = _bound(recorder, index)
        yield
    finally:
        for layer, forward in zip(recorder.stack.layers, shadowed):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward
        for handle in handles:
            handle.remove()


def _bound(recorder: _Recorder, index: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return recorder.call(index, *args, **kwargs)

    return forward


def record_stack(model: nn.Module, stack: LayerStack, batches: Sequence[Batch]) -> list[RecordedBatch]:
    """Return each batch's first hidden states and the calls of all layers of a stack.

    Raises ModelError when a layer runs twice in one pass or is called without hidden states.
    """
    recorder = _Recorder(stack)
    recorded = []
    with watching(model), _standing_in(model, recorder):
        for batch in batches:
            recorder.current = RecordedBatch(batch)
            with suppress(_StackDoneError):
                run_batch(model, batch)
            recorded.append(recorder.current)
    unmap_unchanged(model.parameters())  # embeddings are done with, and a layer's turn may be far away
    return recorded


def stacks_in_order(model: nn.Module, stacks: Sequence[LayerStack], batch: Batch) -> list[LayerStack]:
    """Return the stacks that one batch runs through, in the order in which their first layers run."""
    seen: list[LayerStack] = []

    def note(stack: LayerStack) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if stack not in seen:
                seen.append(stack)
            if len(seen) == len(stacks):
                raise _StackDoneError

        return hook

    handles = [stack.layers[0].register_forward_pre_hook(note(stack)) for stack in stacks]
    try:
        with watching(model), suppress(_StackDoneError):
            run_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen
