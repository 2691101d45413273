"""Tiny models of several families, cut unevenly by hand: other heads and widths in each layer."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

Inputs = dict[str, torch.Tensor]
TOKENS = torch.arange(6, 22).view(2, 8)


def keep_outputs(layer: nn.Module, kept: torch.Tensor) -> None:
    """Keep output features of a Linear or Conv1D."""
    if isinstance(layer, Conv1D):
        layer.weight = nn.Parameter(layer.weight.data[:, kept].clone())
        layer.nf = len(kept)
    else:
        layer.weight = nn.Parameter(layer.weight.data[kept].clone())
        layer.out_features = len(kept)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.data[kept].clone())


def keep_inputs(layer: nn.Module, kept: torch.Tensor) -> None:
    """Keep input features of a Linear or Conv1D."""
    if isinstance(layer, Conv1D):
        layer.weight = nn.Parameter(layer.weight.data[kept].clone())
        layer.nx = len(kept)
    else:
        layer.weight = nn.Parameter(layer.weight.data[:, kept].clone())
        layer.in_features = len(kept)


def rows(heads: list[int], size: int) -> torch.Tensor:
    return torch.tensor([head * size + index for head in heads for index in range(size)], dtype=torch.long)


def narrow(ups: list[nn.Module], down: nn.Module, width: int) -> None:
    kept = torch.arange(down.weight.shape[0 if isinstance(down, Conv1D) else 1])[-width:] if width else rows([], 1)
    for up in ups:
        keep_outputs(up, kept)
    keep_inputs(down, kept)


def separate_heads(q: nn.Module, k: nn.Module, v: nn.Module, o: nn.Module, heads: list[int], size: int) -> None:
    for layer in (q, k, v):
        keep_outputs(layer, rows(heads, size))
    keep_inputs(o, rows(heads, size))


HEADS = ([0, 2, 3], [1])
WIDTHS = (40, 17)


def seeded(kind: type[PreTrainedModel], config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.1))
    return model


def bert(kind: type[PreTrainedModel] = BertForSequenceClassification, **changes: object) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return seeded(kind, config)


def cut_bert(model: PreTrainedModel, heads=HEADS, widths=WIDTHS) -> PreTrainedModel:
    for layer, kept, width in zip(model.base_model.encoder.layer, heads, widths):
        own = layer.attention.self
        separate_heads(own.query, own.key, own.value, layer.attention.output.dense, kept, 8)
        own.num_attention_heads, own.all_head_size = len(kept), 8 * len(kept)
        narrow([layer.intermediate.dense], layer.output.dense, width)
    return model


def llama(kind: type[PreTrainedModel] = LlamaForCausalLM, **changes: object) -> PreTrainedModel:
    options = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "num_labels": 3,
        "num_key_value_heads": 4, "intermediate_size": 48, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    return seeded(kind, LlamaConfig(**{**options, **changes}))


def cut_llama(model: PreTrainedModel, widths=WIDTHS) -> PreTrainedModel:
    """Layer 0 keeps key/value heads 0, 1, 3 with both query heads; layer 1 keeps all four with one query head each."""
    layouts = (([0, 1, 3], [0, 1, 2, 3, 6, 7], 2), ([0, 1, 2, 3], [1, 2, 5, 6], 1))
    for layer, (groups, queries, repeats), width in zip(model.base_model.layers, layouts, widths):
        own = layer.self_attn
        keep_outputs(own.q_proj, rows(queries, 4))
        keep_outputs(own.k_proj, rows(groups, 4))
        keep_outputs(own.v_proj, rows(groups, 4))
        keep_inputs(own.o_proj, rows(queries, 4))
        own.num_key_value_groups = repeats
        narrow([layer.mlp.gate_proj, layer.mlp.up_proj], layer.mlp.down_proj, width)
    return model


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return seeded(GPT2LMHeadModel, config)


def cut_gpt2(model: PreTrainedModel) -> PreTrainedModel:
    for block, kept, width in zip(model.transformer.h, HEADS, WIDTHS):
        own, index = block.attn, rows(kept, 8)
        keep_outputs(own.c_attn, torch.cat([index + part * 32 for part in range(3)]))
        keep_inputs(own.c_proj, index)
        own.num_heads, own.split_size = len(kept), len(index)
        narrow([block.mlp.c_fc], block.mlp.c_proj, width)
    return model


def vit() -> PreTrainedModel:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    return seeded(ViTForImageClassification, config)


def cut_vit(model: PreTrainedModel) -> PreTrainedModel:
    for layer, kept, width in zip(model.vit.layers, HEADS, WIDTHS):
        own = layer.attention
        separate_heads(own.q_proj, own.k_proj, own.v_proj, own.o_proj, kept, 8)
        own.num_attention_heads = len(kept)
        narrow([layer.mlp.fc1], layer.mlp.fc2, width)
    return model


def bart() -> PreTrainedModel:
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    return seeded(BartForConditionalGeneration, config)


def whisper() -> PreTrainedModel:
    config = WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=16,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return seeded(WhisperForConditionalGeneration, config)


def cut_seq2seq(model: PreTrainedModel) -> PreTrainedModel:
    """Cut BART or Whisper: the encoder and, in the other order, self- and cross-attention of the decoder."""
    for stack, order in ((model.model.encoder, (0, 1)), (model.model.decoder, (1, 0))):
        for layer, index in zip(stack.layers, order):
            for name in ("self_attn", "encoder_attn"):
                if (own := getattr(layer, name, None)) is not None:
                    separate_heads(own.q_proj, own.k_proj, own.v_proj, own.out_proj, HEADS[index], 8)
                    own.num_heads = len(HEADS[index])
            narrow([layer.fc1], layer.fc2, WIDTHS[index])
    return model


def t5(**changes: object) -> PreTrainedModel:
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=0, dropout_rate=0.0, **changes,
    )  # fmt: skip
    return seeded(T5ForConditionalGeneration, config)


def cut_t5(model: PreTrainedModel) -> PreTrainedModel:
    """All layers of a stack keep the same heads, because the first one's position bias serves them all."""
    for stack, kept in ((model.encoder, [0, 2, 3]), (model.decoder, [1, 3])):
        for block, width in zip(stack.block, WIDTHS):
            for layer in block.layer[:-1]:
                own = getattr(layer, "SelfAttention", None) or layer.EncDecAttention
                separate_heads(own.q, own.k, own.v, own.o, kept, 8)
                own.n_heads, own.inner_dim = len(kept), 8 * len(kept)
                if own.has_relative_attention_bias:
                    bias = own.relative_attention_bias
                    bias.weight, bias.embedding_dim = nn.Parameter(bias.weight.data[:, kept].clone()), len(kept)
            ffn = block.layer[-1].DenseReluDense
            narrow([ffn.wi], ffn.wo, width)
    return model


def inputs_of(model: PreTrainedModel) -> Inputs:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}
    if model.main_input_name == "input_features":
        return {"input_features": torch.linspace(-1, 1, 2 * 8 * 32).view(2, 8, 32), "decoder_input_ids": TOKENS}
    return {"input_ids": TOKENS} | ({"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {})


FAMILIES = {
    "bert": lambda: cut_bert(bert()),
    "bert-base": lambda: cut_bert(bert(BertModel)),
    "llama": lambda: cut_llama(llama()),
    "llama-tied": lambda: cut_llama(llama(tie_word_embeddings=True)),
    "llama-classifier": lambda: cut_llama(llama(LlamaForSequenceClassification)),
    "gpt2": lambda: cut_gpt2(gpt2()),
    "vit": lambda: cut_vit(vit()),
    "bart": lambda: cut_seq2seq(bart()),
    "whisper": lambda: cut_seq2seq(whisper()),
    "t5": lambda: cut_t5(t5()),
}


def output_of(model: PreTrainedModel) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**inputs_of(model))[0]
