"""Which tokens inside a model count when features are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.outputs import IGNORED, Batch, NextTokens, Outputs


def real_tokens(model: PreTrainedModel, inputs: Batch, features: Tensor, decoder: bool, kind: Outputs) -> Tensor:
    """Mark the tokens that feature losses compare, (rows, tokens): no padding, and no ignored token of a causal LM.

    features: (rows, tokens, ...).  decoder: they belong to an encoder-decoder's decoder, whose padding has no label;
    a classifier's decoder reads the encoder's tokens.
    """
    rows, length = features.shape[:2]
    everything = torch.ones((rows, length), dtype=torch.bool, device=features.device)
    labels = inputs.get("labels")
    if decoder and labels is not None and labels.shape == (rows, length):
        return (labels != IGNORED).to(features.device)
    mask = inputs.get("attention_mask")
    shortened: Any = getattr(model, "_get_feature_vector_attention_mask", None)
    if mask is None:
        mask = everything
    elif mask.shape[-1] != length and shortened is not None:
        mask = shortened(length, mask)
    counted = mask.reshape(rows, -1).bool() if mask.numel() == rows * length else everything
    if isinstance(kind, NextTokens):
        counted = counted & kind.labelled(inputs)
    return counted.to(features.device)
