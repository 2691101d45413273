"""Where a model's outputs hold its answers, which of them count, and over how many the task loss is a mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from hfcompress.errors import ModelError

IGNORED = -100
Inputs = Mapping[str, Any]


class Answers(ABC):
    """What two models' outputs are compared by."""

    labels: ClassVar[tuple[str, ...]] = ("labels",)
    has_logits: ClassVar[bool] = True

    @abstractmethod
    def counted(self, inputs: Inputs) -> Tensor:
        """Mark the answers that count, in the shape of the logits without their last dimension."""

    def logits(self, outputs: Any, inputs: Inputs) -> Tensor:
        """Return the logits, (..., classes)."""
        logits = outputs.get("logits")
        if not isinstance(logits, Tensor):
            raise ModelError(
                f"The model's output has no logits, only {', '.join(outputs)}; there is nothing to compare."
            )
        return logits

    def classes(self, model: Any) -> int | None:
        """Return the number of logits per answer, or None where it depends on the inputs."""
        head = model.get_output_embeddings()
        return int(model.config.num_labels if head is None else head.weight.shape[0])

    def task_weight(self, inputs: Inputs) -> Tensor | int:
        """Return by what the batch's task loss must be multiplied to be a sum over its items."""
        return self.counted(inputs).sum()

    def task_items(self, inputs: Inputs) -> Tensor | int:
        """Return how many items of the batch the task loss counts."""
        return self.counted(inputs).sum()

    def require_labels(self, inputs: Inputs) -> None:
        """Raise ModelError when a column of labels is missing."""
        missing = [name for name in self.labels if name not in inputs]
        if missing:
            raise ModelError(f"The batches hold no '{missing[0]}', only {', '.join(inputs)}; distillation needs them.")


class Labelled(Answers):
    """One answer per label: of a row, of a token, or, for causal language models, of the token before it."""

    def __init__(self, shifted: bool = False) -> None:
        self.shifted = shifted

    def counted(self, inputs: Inputs) -> Tensor:
        """Mark the answers whose label is not -100; a row of numbers (regression, several labels) is one answer."""
        self.require_labels(inputs)
        labels = inputs["labels"]
        if labels.is_floating_point():
            return torch.ones(labels.shape[:1], dtype=torch.bool, device=labels.device)
        return self.targets(labels) != IGNORED

    def targets(self, labels: Tensor) -> Tensor:
        """Return the label of each answer; the last token of a shifted row has none."""
        return F.pad(labels[..., 1:], (0, 1), value=IGNORED) if self.shifted else labels


class Spans(Answers):
    """The first and the last token of an answer inside a text: two distributions over the row's tokens."""

    labels = ("start_positions", "end_positions")
    outside = -1e4  # a logit whose probability is 0 in every dtype

    def counted(self, inputs: Inputs) -> Tensor:
        """Mark both answers of the rows whose positions lie inside the row, as the models' own loss does."""
        return self._inside(inputs)[:, None].expand(-1, 2)

    def _inside(self, inputs: Inputs) -> Tensor:
        self.require_labels(inputs)
        length = inputs["input_ids"].shape[1]
        inside = [(inputs[name].reshape(-1) >= 0) & (inputs[name].reshape(-1) < length) for name in self.labels]
        return inside[0] & inside[1]

    def classes(self, model: Any) -> None:
        """Return None: there are as many as tokens."""

    def logits(self, outputs: Any, inputs: Inputs) -> Tensor:
        """Return both distributions' logits, (rows, 2, tokens); padding has no probability."""
        both = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1)
        mask = inputs.get("attention_mask")
        return both if mask is None else both.masked_fill(mask[:, None].to(both.device) == 0, self.outside)

    def task_weight(self, inputs: Inputs) -> Tensor:
        """Return the number of rows, of which the models' loss is a mean."""
        return self._inside(inputs).sum()

    task_items = task_weight


class Frames(Answers):
    """One answer per frame of sound, whatever the labels say when."""

    def __init__(self, model: Any) -> None:
        self.frames_of = model._get_feat_extract_output_lengths
        self.takes_mean = model.config.ctc_loss_reduction == "mean"

    def classes(self, model: Any) -> int:
        """Return the number of letters."""
        return int(model.config.vocab_size)

    def counted(self, inputs: Inputs) -> Tensor:
        """Mark the frames that the unpadded sound fills."""
        sound = inputs["input_values"] if "input_values" in inputs else inputs["input_features"]
        samples = torch.full((len(sound),), sound.shape[1], device=sound.device)
        mask = inputs.get("attention_mask")
        frames = self.frames_of(samples if mask is None else mask.sum(-1))
        return torch.arange(int(self.frames_of(samples)[0]), device=sound.device) < frames[:, None]

    def task_weight(self, inputs: Inputs) -> int:
        """Return the number of rows for a loss that is a mean of them, 1 for a sum."""
        self.require_labels(inputs)
        return len(inputs["labels"]) if self.takes_mean else 1

    def task_items(self, inputs: Inputs) -> int:
        """Return the number of rows."""
        return len(inputs["labels"])


class Choices(Labelled):
    """One answer per row, among the choices that the row brings."""

    def classes(self, model: Any) -> None:
        """Return None: there are as many as choices."""


class Unanswered(Answers):
    """A model without a head: it has hidden states to compare, and no task loss."""

    labels = ()
    has_logits = False

    def classes(self, model: Any) -> None:
        """Return None: there are no logits."""

    def counted(self, inputs: Inputs) -> Tensor:
        """Mark the rows."""
        first = next(value for value in inputs.values() if isinstance(value, Tensor))
        return torch.ones(len(first), dtype=torch.bool, device=first.device)


def answers_of(model: nn.Module) -> Answers:
    """Return what a model's kind of output is compared by, from its class."""
    name = type(model).__name__
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return Labelled(shifted=True)
    if name in MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values():
        return Spans()
    if name in MODEL_FOR_CTC_MAPPING_NAMES.values():
        return Frames(model)
    if name in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():
        return Choices()
    without_head = [
        one for names in MODEL_MAPPING_NAMES.values() for one in ([names] if isinstance(names, str) else names)
    ]
    return Unanswered() if name in without_head else Labelled()


def rows_of(inputs: Inputs) -> int:
    """Return the number of rows of a batch."""
    return len(next(value for value in inputs.values() if isinstance(value, Tensor)))


def real_tokens(model: PreTrainedModel, inputs: Inputs, features: Tensor, decoder: bool, answers: Answers) -> Tensor:
    """Mark the tokens that feature losses compare, (rows, tokens): no padding, and no ignored token of a causal LM.

    features: (rows, tokens, ...).  decoder: they belong to an encoder-decoder's decoder, whose padding has no label.
    """
    rows, length = features.shape[:2]
    everything = torch.ones((rows, length), dtype=torch.bool, device=features.device)
    if decoder:
        labels = inputs.get("labels")
        return everything if labels is None else (labels != IGNORED).to(features.device)
    mask = inputs.get("attention_mask")
    shortened: Any = getattr(model, "_get_feature_vector_attention_mask", None)
    if mask is None:
        mask = everything
    elif mask.shape[-1] != length and shortened is not None:
        mask = shortened(length, mask)
    counted = mask.reshape(rows, -1).bool() if mask.numel() == rows * length else everything
    if isinstance(answers, Labelled) and answers.shifted:
        counted = counted & answers.counted(inputs)
    return counted.to(features.device)
