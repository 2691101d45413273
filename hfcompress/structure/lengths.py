"""How long the rows of a model may be."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig


def longest_input(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model takes at most (its ``max_position_embeddings``), None where it has no limit.

    RoBERTa and its kin count positions from the padding id on, so their table has that many rows and one more that no
    token reaches.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    return limit - _unreached_positions(text, limit)


def _unreached_positions(config: PreTrainedConfig, limit: int) -> int:
    """Count the first rows of the position table that are never used: a table with a padding row begins after it."""
    if type(config) not in AutoModel._model_mapping:  # code from outside is not run for this
        return 0
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.num_embeddings == limit:
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
