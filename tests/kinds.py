"""A tiny model of every kind of outputs, with rows of different lengths and the collator that pads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from hfcompress.outputs import IGNORED
from tests.conftest import VOCABULARY_SIZE, tiny_llama
from tests.families import FAMILIES

ROWS = 8
OF_LAYERS = ("hidden_states", "relations", "feed_forward")
Row = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class TinyKind:
    """model: makes one, without dropout.  row: makes the row of this number.  padded: rows may differ in length.

    features: losses of features that such a model can have.
    """

    model: Callable[[], hf.PreTrainedModel]
    row: Callable[[int], Row]
    padded: bool = True
    features: tuple[str, ...] = (*OF_LAYERS, "embeddings", "sentence_embedding")

    def make(self, seed: int = 0) -> hf.PreTrainedModel:
        """Return the model with noise on its weights: students far from teachers, and no uniform predictions."""
        torch.manual_seed(seed)
        model = self.model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def rows(self) -> list[Row]:
        """Return eight rows."""
        torch.manual_seed(0)
        return [self.row(index) for index in range(ROWS)]


def encoder(kind: Any, **options: Any) -> Callable[[], hf.PreTrainedModel]:
    """Return a maker of tiny BERTs without dropout."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    options = {"vocab_size": VOCABULARY_SIZE, "max_position_embeddings": 64, "pad_token_id": 0, **options}
    return lambda: kind(hf.BertConfig(**{**sizes, **quiet, **options}))


def family(name: str, **changes: Any) -> Callable[[], hf.PreTrainedModel]:
    """Return a maker of a model of ``tests.families``, without dropout."""

    def make() -> hf.PreTrainedModel:
        config = FAMILIES[name].config()
        for option in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if hasattr(config, option):
                setattr(config, option, 0.0)
        for option, value in changes.items():
            setattr(config, option, value)
        return FAMILIES[name].auto.from_config(config)

    return make


def wav2vec2(**changes: Any) -> hf.PreTrainedModel:
    """A tiny CTC model whose normalization lets padding be masked."""
    config = hf.Wav2Vec2Config(
        vocab_size=15, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        conv_dim=(16, 16), conv_stride=(16, 8), conv_kernel=(16, 8), num_feat_extract_layers=2,
        feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, pad_token_id=0, mask_time_prob=0.0, layerdrop=0.0, hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, **changes,
    )  # fmt: skip
    return hf.Wav2Vec2ForCTC(config)


def words(index: int, more: int = 4) -> Tensor:
    """Return between ``more`` and ``more`` + 4 tokens."""
    return torch.randint(6, VOCABULARY_SIZE, (more + index % 5,))


def text(index: int, **labels: Any) -> Row:
    ids = words(index)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **labels}


def token_labels(index: int, classes: int, first: int = 0) -> Row:
    """A label for some tokens of the row; the second row has none."""
    row = text(index)
    labels = torch.randint(first, classes, row["input_ids"].shape)
    labels[:: 2 + index % 2] = IGNORED
    return {**row, "labels": torch.full_like(labels, IGNORED) if index == 1 else labels}


def question(index: int) -> Row:
    # The answer to the third row was cut off: its end lies behind the row, whatever it is batched with.
    return text(index, start_positions=torch.tensor(index % 4), end_positions=torch.tensor(99 if index == 2 else 3))


def choices(index: int) -> Row:
    ids = torch.stack([words(index) for _ in range(3)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(index % 3)}


def sound(index: int) -> Row:
    samples = torch.randn(1280 + 128 * (index % 3))
    return {
        "input_values": samples,
        "attention_mask": torch.ones(len(samples), dtype=torch.long),
        "labels": letters(index),
    }


def letters(index: int) -> Tensor:
    return torch.randint(1, 15, (2 + index % 3,))


KINDS = {
    # It sets a seed of its own, with which every model would be the same.
    "next tokens": TinyKind(
        lambda: tiny_llama(seed=torch.initial_seed()), lambda index: token_labels(index, VOCABULARY_SIZE, 6)
    ),
    "class": TinyKind(
        encoder(hf.BertForSequenceClassification, num_labels=3), lambda i: text(i, labels=torch.tensor(i % 3))
    ),
    "yes or no": TinyKind(
        encoder(hf.BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"),
        lambda i: text(i, labels=torch.tensor([i % 2, 1, i % 3 == 0]).float()),
    ),
    "numbers": TinyKind(
        encoder(hf.BertForSequenceClassification, num_labels=2, problem_type="regression"),
        lambda i: text(i, labels=torch.tensor([i / 4, -1.0])),
    ),
    "class of a token": TinyKind(
        encoder(hf.BertForTokenClassification, num_labels=3), lambda i: token_labels(i, 3)
    ),
    "hidden token": TinyKind(encoder(hf.BertForMaskedLM), lambda i: token_labels(i, VOCABULARY_SIZE, 6)),
    "span": TinyKind(encoder(hf.BertForQuestionAnswering), question),
    "choice": TinyKind(encoder(hf.BertForMultipleChoice), choices),
    "token of a text": TinyKind(family("t5"), lambda i: text(i, labels=words(i + 3, 2))),
    "class of an image": TinyKind(
        family("vit", num_labels=3),
        lambda i: {"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(i % 3)},
        padded=False,
    ),
    "token of a speech": TinyKind(
        family("whisper"),
        lambda i: {"input_features": torch.randn(8, 32), "labels": words(i + 3, 2)},
    ),
    "letter of a sound": TinyKind(wav2vec2, sound, features=(*OF_LAYERS, "sentence_embedding")),
    "vector": TinyKind(encoder(hf.BertModel, num_labels=2), text),
}  # fmt: skip


def pad(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Batch rows of different lengths: labels are padded with -100, everything else with 0."""
    return {name: _padded([row[name] for row in rows], IGNORED if name == "labels" else 0) for name in rows[0]}


def _padded(values: Sequence[Tensor], value: float) -> Tensor:
    if values[0].dim() == 0 or len({one.shape for one in values}) == 1:
        return torch.stack(list(values))
    longest = max(one.shape[-1] for one in values)
    return torch.stack([torch.nn.functional.pad(one, (0, longest - one.shape[-1]), value=value) for one in values])
