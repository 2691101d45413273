"""What the linear layers inside one layer see, added up, and shared where the inputs are the same tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from hfcompress.calibration.hessian import (
    accumulate_squares_,
    accumulate_triangle_,
    keep_largest_squares_,
    mirror_triangle_,
)
from hfcompress.calibration.record import RecordedBatch
from hfcompress.calibration.routing import unrouted_padding
from hfcompress.calibration.running import watching
from hfcompress.errors import ModelError


@dataclass(frozen=True)
class InputHessian:
    """What the linear layers ``names`` saw in common.

    hessian: (in, in) float32, the Gram matrix of their inputs over ``tokens`` tokens.  lent: for experts, how often
    the average token of the layer is added to it, see ``with_lent_tokens``.
    """

    names: tuple[str, ...]
    hessian: Tensor
    tokens: int
    lent: int = 0


@dataclass(frozen=True)
class InputSquares:
    """What the linear layers ``names`` saw in common.

    squares: (in,) float32, the sum of their squared inputs over ``tokens`` tokens: the diagonal of their Hessian.
    """

    names: tuple[str, ...]
    squares: Tensor
    tokens: int


Observed = TypeVar("Observed", bound=InputHessian | InputSquares)


@dataclass(frozen=True)
class Statistic(Generic[Observed]):
    """What is added up over a linear layer's inputs.

    result: makes what is reported of names, total and tokens.  dimensions: of the total, each as long as the input.
    add_: adds (tokens, in) rows to it.  finish_: makes the total whole at the end.  of_dense: where a layer is
    compressed in one pass, what its linear layers would see if none before them was compressed yet is looked for.
    """

    result: Callable[[tuple[str, ...], Tensor, int], Observed]
    dimensions: int
    add_: Callable[[Tensor, Tensor], None]
    finish_: Callable[[Tensor], Tensor] = lambda total: total
    of_dense: bool = False

    def empty(self, inputs: Tensor) -> Tensor:
        """Return the total before the first of the inputs, (..., in)."""
        return torch.zeros(inputs.shape[-1:] * self.dimensions, dtype=torch.float32, device=inputs.device)


GRAM: Statistic[InputHessian] = Statistic(InputHessian, 2, accumulate_triangle_, mirror_triangle_)
SQUARES: Statistic[InputSquares] = Statistic(InputSquares, 1, accumulate_squares_, of_dense=True)
LARGEST_SQUARES: Statistic[InputSquares] = Statistic(InputSquares, 1, keep_largest_squares_)


@dataclass(frozen=True)
class TokenMasks:
    """Which tokens count: (batch, tokens) masks for the stack's own hidden states and for the encoder's."""

    own: Tensor | None
    context: Tensor | None

    def of_rows(self, start: int, count: int) -> TokenMasks:
        """Return the masks of some rows of the batch."""
        own, context = (None if mask is None else mask[start : start + count] for mask in (self.own, self.context))
        return TokenMasks(own, context)


class _DivergedError(Exception):
    """Linear layers that shared an input in one batch did not in another; never leaves this module."""


def tensor_key(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tells a tensor from all others that live at the same time, and from itself after a change."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version


def real_tokens(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return the inputs as (tokens, in) rows; padding is dropped where the mask's shape fits.

    inputs: (batch, tokens, ..., in) or (batch * tokens, in).  mask: (batch, tokens), nonzero for tokens that count.
    """
    if mask is None or mask.dim() != 2:
        return inputs.reshape(-1, inputs.shape[-1])
    keep = mask.to(inputs.device).bool()
    if inputs.shape[:-1] == (keep.numel(),):
        return inputs[keep.flatten()]
    if inputs.dim() > 2 and inputs.shape[:2] == keep.shape:
        return inputs[keep].reshape(-1, inputs.shape[-1])
    return inputs.reshape(-1, inputs.shape[-1])


class _Observer(Generic[Observed]):
    """Adds up what linear layers see while their layer runs."""

    def __init__(self, linears: Mapping[str, nn.Module], statistic: Statistic[Observed], share: bool) -> None:
        self.linears = linears
        self.statistic = statistic
        self.share = share
        self.owner: dict[str, str] = {}
        self.totals: dict[str, Tensor] = {}
        self.tokens: Counter[str] = Counter()
        self.first_batch: dict[str, int] = {}
        self.batch = -1
        self.masks = TokenMasks(None, None)
        self.context: set[int] = set()
        self.seen: dict[tuple[Any, ...], tuple[str, Tensor]] = {}

    def start(self, masks: TokenMasks, context: set[int]) -> None:
        """Begin a batch.  context: addresses of the tensors that count by the context mask."""
        self.batch += 1
        self.masks = masks
        self.context = context
        self.seen = {}

    def hook(self, name: str) -> Callable[..., None]:
        """Return the forward pre-hook of one linear layer."""

        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.see(name, args[0])

        return see

    def see(self, name: str, inputs: Tensor) -> None:
        """Count one call of a linear layer; inputs: (..., in)."""
        key = tensor_key(inputs)
        # The tensor is kept until the batch ends, or its address could be given to another one.
        first, _ = self.seen.setdefault(key, (name, inputs))
        if name not in self.owner:
            joins = self.share and self.first_batch.get(first) in (None, self.batch)
            self.owner[name] = first if joins else name
            self.first_batch[name] = self.batch
        owner = self.owner[name]
        rows = real_tokens(inputs, self.masks.context if inputs.data_ptr() in self.context else self.masks.own)
        self.tokens[name] += len(rows)
        if owner == name:
            if name not in self.totals:
                self.totals[name] = self.statistic.empty(inputs)
            self.statistic.add_(self.totals[name], rows)
        elif first != owner:
            raise _DivergedError

    def result(self) -> list[Observed]:
        """Return one total per distinct input; raises _DivergedError when siblings saw unlike counts of tokens."""
        if any(self.tokens[name] != self.tokens[owner] for name, owner in self.owner.items()):
            raise _DivergedError
        groups: dict[str, list[str]] = {}
        for name in self.linears:
            if self.tokens[name]:
                groups.setdefault(self.owner[name], []).append(name)
        finish_, result = self.statistic.finish_, self.statistic.result
        return [result(tuple(names), finish_(self.totals[key]), self.tokens[key]) for key, names in groups.items()]


def observe_layer(
    layer: nn.Module,
    index: int,
    batches: Sequence[RecordedBatch],
    masks: Sequence[TokenMasks],
    linears: Mapping[str, nn.Module],
    statistic: Statistic[Observed],
) -> list[Observed]:
    """Run a layer over all batches and return a statistic of the inputs of some of its linear layers.

    Linear layers that always see the same tensor share one result; those that see no token are in none.
    """
    try:
        return _observe(layer, index, batches, masks, linears, statistic, share=True)
    except _DivergedError:
        return _observe(layer, index, batches, masks, linears, statistic, share=False)


def _observe(
    layer: nn.Module,
    index: int,
    batches: Sequence[RecordedBatch],
    masks: Sequence[TokenMasks],
    linears: Mapping[str, nn.Module],
    statistic: Statistic[Observed],
    share: bool,
) -> list[Observed]:
    observer = _Observer(linears, statistic, share)
    handles = [module.register_forward_pre_hook(observer.hook(name)) for name, module in linears.items()]
    try:
        with watching(layer), unrouted_padding(layer, lambda: observer.masks.own):
            for recorded, mask in zip(batches, masks):
                call = recorded.calls.get(index)
                if call is not None and recorded.hidden is not None:
                    observer.start(mask, call.context_pointers())
                    call.run(layer, recorded.hidden)
    finally:
        for handle in handles:
            handle.remove()
    return observer.result()


def refuse_non_finite(name: str, found: Iterable[InputHessian | InputSquares]) -> None:
    """Raise ModelError when a linear layer of ``name`` saw NaN or infinite inputs."""
    for one in found:
        total = one.hessian if isinstance(one, InputHessian) else one.squares
        if not bool(torch.isfinite(total).all()):
            raise ModelError(
                f"{name}: the inputs of {', '.join(one.names)} hold NaN or infinite values on the calibration data. "
                "Check the model in this dtype (float16 overflows where bfloat16 does not) and the data."
            )
