"""The stages that train: on the task, or towards a teacher."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic.dataclasses import dataclass

from hfcompress.distillation.on_policy import OnPolicy
from hfcompress.pruning.options import PruneOptions
from hfcompress.pruning.units.options import HeadPruneOptions, NeuronPruneOptions
from hfcompress.quantization import QuantizeAwareOptions
from hfcompress.recipe.faults import not_a
from hfcompress.recipe.losses import Losses
from hfcompress.recipe.training import Training
from hfcompress.recipe.values import FROZEN, AtLeastOne, Text


def _indices_as_text(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        names = tuple(_indices_as_text(one) for one in value)
        wrong = [not_a("text", one) for one in names if not isinstance(one, str)]
        if wrong or not names:
            raise ValueError(f"a teacher {wrong[0]}" if wrong else "names no teacher")
        return names
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


_TEACHER = {"type": ["string", "integer"]}
Teacher = Annotated[
    Text | tuple[Text, ...],
    BeforeValidator(_indices_as_text),
    WithJsonSchema({"anyOf": [_TEACHER, {"type": "array", "items": _TEACHER, "minItems": 1}], "default": "original"}),
]


Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]


def _check_length(steps: int | None, epochs: float | None) -> None:
    if steps is None and epochs is None:
        raise ValueError("give either steps or epochs")
    if steps is not None and epochs is not None:
        raise ValueError(f"give either steps or epochs, not both (steps={steps}, epochs={epochs:g})")


@dataclass(frozen=True, config=FROZEN)
class Finetune:
    """Train on the task, if asked while pruning and for few bits.

    steps: optimizer steps.  epochs: passes over the training data, instead of steps.
    prune: gradual pruning of weights during the training.  prune_heads, prune_neurons: gradual closing of heads or
    neurons, which a shrink stage removes.  quantize_aware: train the weights for the grid that they are stored on;
    the stage then packs them, so it is the last.
    dropout: of every dropout of the model, attention's too, during this training; 0 switches dropout off, and unless
    given each has what the model's config says.  training: fields of transformers.TrainingArguments.
    """

    steps: AtLeastOne | None = None
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    prune: PruneOptions | None = None
    prune_heads: HeadPruneOptions | None = None
    prune_neurons: NeuronPruneOptions | None = None
    quantize_aware: QuantizeAwareOptions | None = None
    dropout: Probability | None = None
    training: Training = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_length(self.steps, self.epochs)


@dataclass(frozen=True, config=FROZEN)
class Distill:
    """Train towards a teacher's outputs, if asked while pruning and for few bits.

    teacher: ``original``, the name or index of an earlier stage, a model id, or a folder that ``hfcompress
    cache-teacher`` wrote; or a list of these.  teacher_weights: shares of several teachers; equal unless given.
    losses: what the student is compared by, each a name or a name with its options; one that fits the task unless
    given.  temperature: of that one, where none are given, 2 by default: divides both models' logits.
    alpha: share of the distillation losses; the task loss has the rest.
    on_policy: let the student of a language model write part of the texts itself, after ``prompt_tokens`` of a row.
    steps: optimizer steps.  epochs: passes over the training data, instead of steps.
    prune: gradual pruning of weights during the training.  prune_heads, prune_neurons: gradual closing of heads or
    neurons, which a shrink stage removes.  quantize_aware: train the weights for the grid that they are stored on;
    the stage then packs them, so it is the last.
    dropout: of every dropout of the model, attention's too, during this training; 0 switches dropout off, and unless
    given each has what the model's config says.  training: fields of transformers.TrainingArguments.
    """

    teacher: Teacher = "original"
    teacher_weights: tuple[Share, ...] | None = None
    losses: Losses = None
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    on_policy: OnPolicy | None = None
    steps: AtLeastOne | None = None
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    prune: PruneOptions | None = None
    prune_heads: HeadPruneOptions | None = None
    prune_neurons: NeuronPruneOptions | None = None
    quantize_aware: QuantizeAwareOptions | None = None
    dropout: Probability | None = None
    training: Training = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_length(self.steps, self.epochs)
        if self.losses is not None and self.temperature is not None:
            raise ValueError("temperature is an option of the losses that have one: give it to them")
        if self.on_policy is not None and self.on_policy.prompt_tokens is None:
            raise ValueError("on_policy needs prompt_tokens: a recipe's rows are texts without a prompt of their own")
        shares = self.teacher_weights
        if shares is not None and (len(shares) != len(self.teachers) or sum(shares) == 0):
            raise ValueError(f"teacher_weights must be a share for each of {len(self.teachers)} teachers, not all 0")

    @property
    def teachers(self) -> tuple[str, ...]:
        """Return the names of all teachers."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher
