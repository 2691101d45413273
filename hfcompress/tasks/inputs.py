"""Batches as a model is shown them when nothing is learnt: without labels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hfcompress.errors import ModelError
from hfcompress.outputs import IGNORED

LABELS = ("labels", "start_positions", "end_positions")


def without_labels(batch: Mapping[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """Return a batch's inputs; an encoder-decoder's labels become the inputs of its decoder, with their padding."""
    inputs = {name: value for name, value in batch.items() if name not in LABELS}
    if config.is_encoder_decoder and "labels" in batch and "decoder_input_ids" not in batch:
        inputs.update(decoder_inputs(batch["labels"], config))
    return inputs


def decoder_inputs(labels: Tensor, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Return what a decoder reads while it predicts labels: all of them moved one place, after its start token.

    labels: (rows, tokens), -100 where nothing is predicted.
    """
    start, padding = config.decoder_start_token_id, config.pad_token_id
    if start is None:
        raise ModelError("The model's config has no decoder_start_token_id, which its decoder begins with. Set it.")
    moved = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=start)
    seen = moved != IGNORED
    return {
        "decoder_input_ids": moved.masked_fill(~seen, padding if padding is not None else 0),
        "decoder_attention_mask": seen.long(),
    }
