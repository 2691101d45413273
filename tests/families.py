"""Tiny models of every architecture that the structure, checkpoint and quantization tests cover."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.conftest import VOCABULARY_SIZE

LAYERS = 4
HIDDEN = 32


@dataclasses.dataclass(frozen=True)
class Family:
    """A tiny model of one architecture, and what is known of its stacks."""

    auto: Any
    config: Callable[[], hf.PreTrainedConfig]
    stacks: dict[str, int]
    linears_per_layer: tuple[int, ...]
    inputs: str = "tokens"

    def model(self) -> hf.PreTrainedModel:
        torch.manual_seed(0)
        model = self.auto.from_config(self.config())
        # Families initialise residual branches or norms to (nearly) nothing; noise makes every layer matter.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    @property
    def generates(self) -> bool:
        return self.auto is hf.AutoModelForCausalLM


def _config(kind: type, **options: Any) -> Callable[[], hf.PreTrainedConfig]:
    """Return a maker of configs of the common tiny size."""
    common = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 4,
        "eos_token_id": 5,
    }
    return lambda: kind(**{**common, **options})


def _decoder(kind: type, **options: Any) -> Callable[[], hf.PreTrainedConfig]:
    return _config(kind, **{"num_key_value_heads": 2, "head_dim": 8, **options})


CLASSIFIER, DECODER, SEQ2SEQ = hf.AutoModelForSequenceClassification, hf.AutoModelForCausalLM, hf.AutoModelForSeq2SeqLM
FAMILIES = {
    "bert": Family(CLASSIFIER, _config(hf.BertConfig), {"bert.encoder.layer": LAYERS}, (6,)),
    "roberta": Family(CLASSIFIER, _config(hf.RobertaConfig), {"roberta.encoder.layer": LAYERS}, (6,)),
    "electra": Family(
        CLASSIFIER, _config(hf.ElectraConfig, embedding_size=16), {"electra.encoder.layer": LAYERS}, (6,)
    ),
    "distilbert": Family(
        CLASSIFIER,
        lambda: hf.DistilBertConfig(
            vocab_size=VOCABULARY_SIZE, dim=HIDDEN, hidden_dim=48, n_layers=LAYERS, n_heads=4, pad_token_id=0
        ),
        {"distilbert.transformer.layer": LAYERS},
        (6,),
    ),
    "llama": Family(DECODER, _decoder(hf.LlamaConfig), {"model.layers": LAYERS}, (7,)),
    "qwen2": Family(
        DECODER,
        _decoder(hf.Qwen2Config, use_sliding_window=True, sliding_window=4, max_window_layers=2),
        {"model.layers": LAYERS},
        (7,),
    ),
    "qwen3": Family(DECODER, _decoder(hf.Qwen3Config), {"model.layers": LAYERS}, (7,)),
    "gemma3": Family(
        DECODER,
        _decoder(
            hf.Gemma3TextConfig,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        ),
        {"model.layers": LAYERS},
        (7,),
    ),
    "smollm3": Family(
        DECODER, _decoder(hf.SmolLM3Config, no_rope_layers=[1, 0, 0, 1]), {"model.layers": LAYERS}, (7,)
    ),
    "mistral": Family(DECODER, _decoder(hf.MistralConfig, sliding_window=4), {"model.layers": LAYERS}, (7,)),
    "phi3": Family(DECODER, _decoder(hf.Phi3Config), {"model.layers": LAYERS}, (4,)),
    "gpt2": Family(
        DECODER,
        lambda: hf.GPT2Config(
            vocab_size=VOCABULARY_SIZE,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=4,
            n_positions=64,
            bos_token_id=4,
            eos_token_id=5,
            pad_token_id=0,
        ),
        {"transformer.h": LAYERS},
        (4,),
    ),
    "gpt_neox": Family(DECODER, _config(hf.GPTNeoXConfig), {"gpt_neox.layers": LAYERS}, (4,)),
    "vit": Family(
        hf.AutoModelForImageClassification,
        _config(hf.ViTConfig, image_size=8, patch_size=4),
        {"vit.layers": LAYERS},
        (6,),
        "pixels",
    ),
    "bart": Family(
        SEQ2SEQ,
        lambda: hf.BartConfig(
            vocab_size=VOCABULARY_SIZE,
            d_model=HIDDEN,
            encoder_layers=LAYERS,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            pad_token_id=0,
            bos_token_id=4,
            eos_token_id=5,
            decoder_start_token_id=4,
            forced_eos_token_id=5,
        ),
        {"model.encoder.layers": LAYERS, "model.decoder.layers": 3},
        (6, 10),
    ),
    "t5": Family(
        SEQ2SEQ,
        lambda: hf.T5Config(
            vocab_size=VOCABULARY_SIZE,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=48,
            num_layers=LAYERS,
            num_decoder_layers=3,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=5,
            decoder_start_token_id=0,
        ),
        {"encoder.block": LAYERS, "decoder.block": 3},
        (6, 10),
    ),
    "whisper": Family(
        hf.AutoModelForSpeechSeq2Seq,
        lambda: hf.WhisperConfig(
            vocab_size=VOCABULARY_SIZE,
            num_mel_bins=8,
            d_model=HIDDEN,
            encoder_layers=LAYERS,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=16,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=4,
            eos_token_id=5,
            decoder_start_token_id=4,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        {"model.encoder.layers": LAYERS, "model.decoder.layers": 3},
        (6, 10),
        "audio",
    ),
    "clip": Family(
        hf.AutoModel,
        lambda: hf.CLIPConfig(
            text_config={
                "vocab_size": VOCABULARY_SIZE,
                "hidden_size": HIDDEN,
                "intermediate_size": 48,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "max_position_embeddings": 16,
                "pad_token_id": 0,
                "bos_token_id": 4,
                "eos_token_id": 5,
            },
            vision_config={
                "hidden_size": HIDDEN,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": 8,
                "patch_size": 4,
            },
            projection_dim=16,
        ),
        {"text_model.encoder.layers": LAYERS, "vision_model.encoder.layers": 3},
        (6, 6),
        "text and pixels",
    ),
    "modernbert": Family(
        CLASSIFIER,
        _config(
            hf.ModernBertConfig,
            local_attention=4,
            cls_token_id=2,
            sep_token_id=3,
            layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        ),
        {"model.layers": LAYERS},
        (4,),
    ),
    "deberta_v2": Family(
        CLASSIFIER,
        _config(hf.DebertaV2Config, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8),
        {"deberta.encoder.layer": LAYERS},
        (8,),
    ),
}


def inputs_of(family: Family) -> dict[str, Tensor]:
    """Two rows for the family's forward; token rows are padded to different lengths."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(6, VOCABULARY_SIZE, (2, 10), generator=random)
    attention = torch.ones_like(ids)
    attention[1, 7:] = 0
    ids[1, 7:] = 0
    tokens = {"input_ids": ids, "attention_mask": attention}
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8, generator=random)}
    decoder = {"decoder_input_ids": torch.randint(6, VOCABULARY_SIZE, (2, 6), generator=random)}
    if family.inputs == "audio":
        return {"input_features": torch.randn(2, 8, 32, generator=random), **decoder}
    if family.inputs == "pixels":
        return pixels
    if family.inputs == "text and pixels":
        return {**tokens, **pixels}
    return {**tokens, **decoder} if family.auto is SEQ2SEQ else tokens
