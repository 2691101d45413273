"""Attention of calibration passes on CPUs that have instructions for bfloat16 products, but no matrix tiles.

PyTorch's own kernel multiplies small blocks there, head after head.  All queries that share a key/value head are
multiplied at once here, as many as stay in the caches.  As eager attention of Transformers does, it rounds scores and
probabilities to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from hfcompress.devices import vector_bfloat16

QUERIES = 64  # of a head, in a block
SCORES = 5 << 18  # of a block, which stay in the caches


def fast_attention() -> AbstractContextManager[Any]:
    """Give a context in which ``scaled_dot_product_attention`` without a mask is faster where the CPU is of that kind.

    For passes without gradients; whatever the function here cannot do is done by PyTorch's own.
    """
    return _InBlocks() if vector_bfloat16() else nullcontext()


@contextmanager
def usual_functions() -> Iterator[None]:
    """Leave ``fast_attention`` for a while: within it, each of the many small steps of a loop costs more."""
    mode = _get_current_function_mode()
    if not isinstance(mode, _InBlocks):
        yield
        return
    mode.__exit__(None, None, None)
    try:
        yield
    finally:
        mode.__enter__()


class _InBlocks(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            answer = attention_in_blocks(*args, **kwargs)
            if answer is not None:
                return answer
        return func(*args, **kwargs)


def attention_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Return what ``torch.nn.functional.scaled_dot_product_attention`` would, or None where this cannot.

    query: (rows, heads, tokens, size).  key, value: (rows, key/value heads, tokens, size).  It can where all are
    bfloat16 on the CPU, without mask, dropout and gradients, and with as many keys as queries where it is causal.
    """
    fits = all(
        one.dtype == torch.bfloat16 and one.device.type == "cpu" and one.dim() == 4 for one in (query, key, value)
    )
    if not fits or attn_mask is not None or dropout_p or torch.is_grad_enabled():
        return None
    rows, heads, tokens, size = query.shape
    shared, keys = key.shape[1:3]
    if value.shape[:3] != key.shape[:3] or len(key) != rows or key.shape[-1] != size:
        return None
    if heads % shared or (heads != shared and not enable_gqa) or (is_causal and keys != tokens):
        return None
    query = query.reshape(rows * shared, heads // shared, tokens, size)
    key, value = key.reshape(rows * shared, keys, size).mT, value.reshape(rows * shared, keys, -1)
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    scale = size**-0.5 if scale is None else scale
    together = max(1, SCORES // (heads // shared * QUERIES * keys))
    for start in range(0, len(query), together):
        part = slice(start, start + together)
        _write_attention_(output[part], query[part], key[part], value[part], is_causal, scale)
    return output.view(rows, heads, tokens, -1)


def _write_attention_(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> None:
    """Write the attention of queries that share keys, block by block.

    output, query: (n, heads that share keys, tokens, size).  key: (n, size, keys).  value: (n, keys, size).
    """
    tokens, keys = query.shape[2], key.shape[-1]
    later = query.new_full((QUERIES, QUERIES), -torch.inf).triu_(1)
    for start in range(0, tokens, QUERIES):
        block = query[:, :, start : start + QUERIES]
        seen = start + block.shape[2] if is_causal else keys
        scores = torch.baddbmm(block.new_empty(1), block.flatten(1, 2), key[..., :seen], beta=0, alpha=scale)
        scores = scores.view(*block.shape[:3], seen)
        if is_causal:
            scores[..., start:].add_(later[: block.shape[2], : block.shape[2]])
        probabilities = scores.softmax(-1).flatten(1, 2)
        output[:, :, start : start + QUERIES] = torch.bmm(probabilities, value[:, :seen]).view(*block.shape[:3], -1)
