"""Which tokens experts get while a model is calibrated: padding is routed to none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hfcompress.packed.experts import SplitExperts, split_experts


@contextmanager
def unrouted_padding(layer: nn.Module, mask: Callable[[], Tensor | None]) -> Iterator[None]:
    """Send tokens that do not count to no expert.  mask: gives (batch, tokens), nonzero for tokens that count."""

    def hook(experts: SplitExperts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        given = {**dict(zip(names, args)), **kwargs}
        real = mask()
        if real is not None and real.numel() == len(given["hidden_states"]):
            padding = real.flatten().to(given["top_k_index"].device) == 0
            given["top_k_index"] = given["top_k_index"].masked_fill(padding.unsqueeze(1), experts.count)
        return (), given

    handles = [one.register_forward_pre_hook(hook, with_kwargs=True) for one in split_experts(layer).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
