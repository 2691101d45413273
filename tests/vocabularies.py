"""Small tokenizers of every kind, trained on Python's own documentation, and tiny models that use them."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pydoc_data import topics
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [topics.topics[name] for name in sorted(topics.topics, key=lambda name: len(topics.topics[name]))][5:45]
CORPUS = TEXTS[:4]
ELSEWHERE = [*TEXTS[-2:], "Zebras quizzically jump, 0123456789 times!", "na\u00efve caf\u00e9 \u2603 \U0001d6fc"]
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@cache
def trained(kind: str) -> dict[str, Any]:
    """Return the ``model`` part of the JSON of a tokenizer of 700 tokens."""
    if kind == "wordpiece":
        core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer: Any = trainers.WordPieceTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    elif kind == "bytelevel":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    elif kind == "clip":
        core = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        core.normalizer = normalizers.Lowercase()
        trainer = trainers.BpeTrainer(vocab_size=700, end_of_word_suffix="</w>", show_progress=False)
    elif kind == "metaspace":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False)
    else:
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
        trainer = trainers.UnigramTrainer(vocab_size=700, show_progress=False)
    core.train_from_iterator(TEXTS, trainer)
    return json.loads(core.to_str())["model"]


def merges_of(kind: str) -> list[tuple[str, str]]:
    return [(left, right) for left, right in trained(kind)["merges"]]


def ids_of(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def bert_tokenizer() -> Any:
    return hf.BertTokenizer(vocab=dict(trained("wordpiece")["vocab"]), model_max_length=64)


def gpt2_tokenizer() -> Any:
    vocabulary = ids_of([*trained("bytelevel")["vocab"], "<|endoftext|>"])
    return hf.GPT2Tokenizer(vocab=vocabulary, merges=merges_of("bytelevel"))


def roberta_tokenizer() -> Any:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = ids_of([*special, *trained("bytelevel")["vocab"], "<mask>"])
    return hf.RobertaTokenizer(vocab=vocabulary, merges=merges_of("bytelevel"))


def llama3_tokenizer() -> Any:
    """Byte-level, whole words first (``ignore_merges``), special tokens behind the vocabulary, a chat template."""
    vocabulary = ids_of([*trained("bytelevel")["vocab"], "ĠZebrazzz"])
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges_of("bytelevel"), ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<image>"]})
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = CHAT
    return tokenizer


def llama2_tokenizer() -> Any:
    """Pieces with a space mark and 256 byte tokens to fall back on."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = ids_of(["<unk>", "<s>", "</s>", *byte_tokens, *trained("metaspace")["vocab"]])
    return hf.LlamaTokenizer(vocab=vocabulary, merges=merges_of("metaspace"), pad_token="<unk>")


def clip_tokenizer() -> Any:
    vocabulary = ids_of([*trained("clip")["vocab"], "<|startoftext|>", "<|endoftext|>"])
    return hf.CLIPTokenizer(vocab=vocabulary, merges=merges_of("clip"))


def pieces() -> list[tuple[str, float]]:
    """Return the trained pieces with scores in 1024ths.

    A tokenizer's file can come back with scores that differ in their last bit, which decides between splits of equal
    score; a small corpus has many of them.  These scores, and their sums, come back as they were.
    """
    return [(token, round(1024 * score) / 1024) for token, score in trained("unigram")["vocab"] if token != "<unk>"]


def t5_tokenizer() -> Any:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    sentinels = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    return hf.T5Tokenizer(vocab=[*special, *pieces(), *sentinels])


def xlmr_tokenizer() -> Any:
    special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return hf.XLMRobertaTokenizer(vocab=[*special, *pieces(), ("<mask>", 0.0)])


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A tokenizer, a tiny model's class and config, and how many embedding rows lie beyond the tokenizer."""

    tokenizer: Callable[[], Any]
    auto: Any
    config: Callable[[int, Any], hf.PreTrainedConfig]
    padding: int = 0

    def make(self) -> tuple[Any, Any]:
        """Return (model, tokenizer); all weights and biases are random, so that each of them matters."""
        tokenizer = self.tokenizer()
        torch.manual_seed(0)
        config = self.config(len(tokenizer) + self.padding, tokenizer)
        model = self.auto.from_config(config) if hasattr(self.auto, "from_config") else self.auto(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if name == "final_logits_bias":
                    buffer.normal_()
        return model.eval(), tokenizer

    @property
    def is_seq2seq(self) -> bool:
        return self.auto is hf.AutoModelForSeq2SeqLM or self.auto is hf.WhisperForConditionalGeneration


def _special(tokenizer: Any) -> dict[str, Any]:
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def _of(kind: type, **options: Any) -> Callable[[int, Any], hf.PreTrainedConfig]:
    return lambda rows, tokenizer: kind(
        vocab_size=rows, max_position_embeddings=1024, **{**_special(tokenizer), **SMALL, **copy.deepcopy(options)}
    )


def _gpt2(rows: int, tokenizer: Any) -> hf.PreTrainedConfig:
    return hf.GPT2Config(vocab_size=rows, n_embd=32, n_layer=2, n_head=4, n_positions=1024, **_special(tokenizer))


def _t5(rows: int, tokenizer: Any) -> hf.PreTrainedConfig:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return hf.T5Config(vocab_size=rows, **sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)


def _bart(rows: int, tokenizer: Any) -> hf.PreTrainedConfig:
    return hf.BartConfig(
        vocab_size=rows,
        **SMALL_SEQ2SEQ,
        **_special(tokenizer),
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )


def _clip(rows: int, tokenizer: Any) -> hf.PreTrainedConfig:
    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    text = {**SMALL, "vocab_size": rows, **_special(tokenizer), "max_position_embeddings": 1024}
    return hf.CLIPConfig(text_config=text, vision_config=vision)


MASKED, CAUSAL, SEQ2SEQ = hf.AutoModelForMaskedLM, hf.AutoModelForCausalLM, hf.AutoModelForSeq2SeqLM
CLASSIFIER = hf.AutoModelForSequenceClassification
CASES = {
    "bert-masked": Case(bert_tokenizer, MASKED, _of(hf.BertConfig)),
    "bert-classifier": Case(bert_tokenizer, CLASSIFIER, _of(hf.BertConfig)),
    "electra-masked": Case(bert_tokenizer, MASKED, _of(hf.ElectraConfig, embedding_size=16), padding=6),
    "roberta-masked": Case(roberta_tokenizer, MASKED, _of(hf.RobertaConfig)),
    "gpt2": Case(gpt2_tokenizer, CAUSAL, _gpt2),
    "llama3": Case(llama3_tokenizer, CAUSAL, _of(hf.LlamaConfig, tie_word_embeddings=False), padding=40),
    "llama3-tied": Case(llama3_tokenizer, CAUSAL, _of(hf.LlamaConfig, tie_word_embeddings=True)),
    "llama2": Case(llama2_tokenizer, CAUSAL, _of(hf.LlamaConfig), padding=7),
    "bart": Case(roberta_tokenizer, SEQ2SEQ, _bart),
    "t5": Case(t5_tokenizer, SEQ2SEQ, _t5, padding=28),
    "xlmr-masked": Case(xlmr_tokenizer, MASKED, _of(hf.XLMRobertaConfig)),
    "xlmr-classifier": Case(xlmr_tokenizer, CLASSIFIER, _of(hf.XLMRobertaConfig), padding=3),
    "clip": Case(clip_tokenizer, hf.CLIPTextModelWithProjection, lambda rows, tok: _clip(rows, tok).text_config),
}
