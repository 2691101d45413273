"""Run a model once with every linear layer cut loose, to see what acts on what between two linear layers.

During the run the output of each linear layer (and embedding, and attention) is replaced by a random positive leaf of
the autograd graph.  The graph of any tensor then ends at the linear layers just before it, whatever the weights are,
and gradients say which output features act on which head or neuron.  No architecture is known by name.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import sdpa_mask

from hfcompress.errors import ModelError
from hfcompress.structure.exceptions import ATTENTION_RULES
from hfcompress.structure.influence import leaves_of
from hfcompress.structure.inputs import dummy_inputs
from hfcompress.structure.modes import attention_implementation, eval_mode
from hfcompress.structure.stack import WEIGHT_TYPES

NAME = "hfcompress_probe"
LEAF_TYPES = (*WEIGHT_TYPES, nn.Embedding)


@dataclass(frozen=True)
class LinearCall:
    """One call of a linear layer or an embedding: ``inputs`` as they came, ``leaf`` as what was handed on."""

    name: str
    module: nn.Module
    inputs: Tensor
    leaf: Tensor


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention module.

    query: (batch, heads, length, head_dim).  key, value: (batch, key/value heads, length, head_dim).  leaf: (batch,
    length, heads, head_dim), handed on as the output.  extra: further tensors shaped like queries.  biases: tensors
    with heads in dimension 1 that are added to the attention scores.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    leaf: Tensor
    extra: tuple[Tensor, ...] = ()
    biases: tuple[Tensor, ...] = ()


@dataclass
class Trace:
    """What one run saw, in the order of the calls."""

    linears: list[LinearCall] = field(default_factory=list)
    attentions: list[AttentionCall] = field(default_factory=list)
    config_reads: dict[nn.Module, set[str]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    caches: list[Cache] = field(default_factory=list)
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def leaf_like(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Return a leaf of values in [0.5, 1.5), where no usual activation is flat."""
        values = torch.rand(shape, generator=self.random) + 0.5
        return values.to(like.device, like.dtype).requires_grad_()

    def sources_of(self, tensor: Tensor) -> list[LinearCall]:
        """Return the calls whose leaves the tensor depends on."""
        found = {id(leaf) for leaf in leaves_of(tensor)}
        return [call for call in self.linears if id(call.leaf) in found]

    @functools.cached_property
    def listeners(self) -> dict[int, list[LinearCall | None]]:
        """The linear calls whose inputs depend on a leaf, by the leaf's id; None stands for the model's output."""
        found: dict[int, list[LinearCall | None]] = {}
        for call in self.linears:
            for leaf in leaves_of(call.inputs):
                found.setdefault(id(leaf), []).append(call)
        for output in self.outputs:
            for leaf in leaves_of(output):
                found.setdefault(id(leaf), []).append(None)
        return found


_trace: ContextVar[Trace] = ContextVar("hfcompress_trace")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Stand in for the attention function: note what comes in, hand a leaf on."""
    trace = _trace.get()
    batch, heads, length, _ = query.shape
    leaf = trace.leaf_like(torch.Size((batch, length, heads, value.shape[-1])), value)
    fourfold = [value for value in options.values() if isinstance(value, Tensor) and value.dim() == 4]
    biases = tuple(bias for bias in fourfold if bias.shape[1] == heads)
    trace.attentions.append(AttentionCall(module, query, key, value, leaf, biases=biases))
    return leaf.clone(), None  # a copy, which the model may change in place


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def trace_model(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> Trace:
    """Run the model once on ``inputs`` (default: ``dummy_inputs``) and return what each cut-loose part saw.

    Weights, modes, hooks, attention implementation and random state are afterwards as they were.  Raises ModelError
    when the model cannot run on these inputs.
    """
    trace = Trace()
    arguments = dict(inputs if inputs is not None else dummy_inputs(model))
    parameters = inspect.signature(model.forward).parameters.values()
    takes_any = any(one.name == "use_cache" or one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    if takes_any and hasattr(model.config.get_text_config(decoder=True), "use_cache"):
        arguments["use_cache"] = True
    with contextlib.ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(attention_implementation(model, NAME))
        stack.enter_context(_recorded_configs(model, trace))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_hooks(model, trace))
        stack.callback(_trace.reset, _trace.set(trace))
        try:
            outputs = model(**arguments)
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} could not run on {', '.join(arguments)} to find its structure "
                f"({type(error).__name__}: {error}); give the arguments of a forward that works with inputs=..."
            ) from error
    for value in outputs.values() if isinstance(outputs, Mapping) else outputs:
        if isinstance(value, Tensor) and value.requires_grad:
            trace.outputs.append(value)
        elif isinstance(value, EncoderDecoderCache):
            trace.caches += [value.self_attention_cache, value.cross_attention_cache]
        elif isinstance(value, Cache):
            trace.caches.append(value)
    return trace


class _RecordedConfig:
    """Hands out a config's values and notes which ones were asked for."""

    def __init__(self, config: PreTrainedConfig, reads: set[str]) -> None:
        self._config, self._reads = config, reads

    def __getattr__(self, name: str) -> Any:
        self._reads.add(name)
        return getattr(self._config, name)


@contextlib.contextmanager
def _recorded_configs(model: nn.Module, trace: Trace) -> Iterator[None]:
    before: dict[nn.Module, PreTrainedConfig] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
            before[module] = config
    try:
        for module, config in before.items():
            module.config = _RecordedConfig(config, trace.config_reads.setdefault(module, set()))  # type: ignore[assignment]
        yield
    finally:
        for module, config in before.items():
            module.config = config  # type: ignore[assignment]


@contextlib.contextmanager
def _hooks(model: nn.Module, trace: Trace) -> Iterator[None]:
    names = {module: name for name, module in model.named_modules()}
    arrived: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            arrived[module] = args[0]

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if module not in arrived:  # position tables that are asked for a shape instead of indices
            return output
        leaf = trace.leaf_like(output.shape, output)
        trace.linears.append(LinearCall(names[module], module, arrived.pop(module), leaf))
        return leaf.clone()  # a copy, which the model may change in place

    def ruled(rule: Callable[..., Any]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Any, ...]:
            parts, heads = rule(module, {call.name: call.leaf for call in trace.linears}, names)
            size = output[0].shape
            leaf = trace.leaf_like(torch.Size((*size[:-1], heads, size[-1] // heads)), output[0])
            query, key, value, *others = parts
            trace.attentions.append(AttentionCall(module, query, key, value, leaf, extra=tuple(others)))
            return (leaf.flatten(-2), *output[1:])

        return hook

    handles = []
    try:
        for module in model.modules():
            if isinstance(module, LEAF_TYPES):
                # Before any other hook: a closed gate must not hide what its linear layer listens to.
                handles.append(module.register_forward_pre_hook(before, prepend=True))
                handles.append(module.register_forward_hook(after))
            elif type(module).__name__ in ATTENTION_RULES:
                handles.append(module.register_forward_hook(ruled(ATTENTION_RULES[type(module).__name__])))
        yield
    finally:
        for handle in handles:
            handle.remove()
