"""Small inputs that any model of its kind can run, made from its config alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.errors import ModelError

TOKENS = 8
AUDIO_SAMPLES = 4096


def dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return inputs of one row for ``model.forward`` by the model's main input name, on the model's device.

    Token models get eight tokens, image models one random image of the config's size, audio models random features.
    Encoder-decoders get decoder tokens too, multiple choice two equal choices; a model of text and images gets both.
    """
    inputs = {model.main_input_name: _one(model, model.main_input_name)}
    accepted = inspect.signature(model.forward).parameters
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {name: value[:, None].expand(-1, 2, -1) for name, value in inputs.items()}
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _one(model, "decoder_input_ids")
    # Two towers without image tokens, such as CLIP: the second tower needs its own input.
    config = model.config
    if hasattr(config, "vision_config") and "pixel_values" in accepted and not _has_image_token(config):
        inputs["pixel_values"] = _one(model, "pixel_values")
        if "input_ids" in accepted:
            inputs["input_ids"] = _one(model, "input_ids")
    return {name: value.to(model.device) for name, value in inputs.items()}


def _has_image_token(config: PreTrainedConfig) -> bool:
    return any("image_token" in name for name in vars(config))


def _one(model: PreTrainedModel, name: str) -> Tensor:
    """Return one input tensor by its name in the Transformers conventions."""
    random = torch.Generator().manual_seed(0)
    config = model.config
    if name in ("input_ids", "decoder_input_ids"):
        text = config.get_text_config()
        ids = torch.arange(2, 2 + TOKENS) % text.vocab_size
        end = getattr(text, "eos_token_id", None)
        ids[-1] = end if isinstance(end, int) and 0 <= end < text.vocab_size else ids[-1]
        return ids[None]
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size: Any = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = [1, getattr(vision, "num_channels", 3), height, width]
        return torch.rand(shape, generator=random).to(model.dtype)
    if name == "input_features":
        # Whisper's two convolutions halve the frames once.
        shape = [1, getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 1500)]
        return torch.rand(shape, generator=random).to(model.dtype)
    if name == "input_values":
        return torch.rand((1, AUDIO_SAMPLES), generator=random).to(model.dtype)
    raise ModelError(
        f"{type(model).__name__} takes {name}, for which no dummy input is known; give one batch with inputs=..."
    )
