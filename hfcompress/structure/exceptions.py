"""The few families whose attention does not run through Transformers' attention interface, by class name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

Leaves = Mapping[str, Tensor]
Parts = tuple[list[Tensor], int]


def _disentangled(module: nn.Module, leaves: Leaves, names: Mapping[nn.Module, str]) -> Parts:
    """DeBERTa v2 and v3 (arXiv 2006.03654): keys and queries of relative positions have heads of their own.

    Returns query, key and value and the position projections as (1, heads, length, head_dim), and the head count.
    """
    heads = int(module.num_attention_heads)  # type: ignore[arg-type]
    parts = []
    for name in ("query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj"):
        projection = getattr(module, name, None)
        if projection is not None:
            leaf = leaves[names[projection]]
            parts.append(leaf.reshape(1, -1, heads, leaf.shape[-1] // heads).transpose(1, 2))
    return parts, heads


ATTENTION_RULES: dict[str, Callable[..., Parts]] = {"DisentangledSelfAttention": _disentangled}
