"""What losses of inner representations share: where they look, and distances of rows of tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hfcompress.distillation.losses.base import FORBID, Loss
from hfcompress.distillation.losses.layer_map import Layers
from hfcompress.distillation.losses.taps import Tap
from hfcompress.structure import LayerStack, layer_stacks

Distance = Literal["mse", "cosine"]
Layered = Sequence[Sequence[tuple[Tap, ...] | None]]


@dataclass(frozen=True, config=FORBID)
class FeatureLoss(Loss):
    """A loss of what both models compute on the way.

    projected: the student's features pass through a learned projection where their width is not the teacher's.
    found_by_running: ``find`` runs the model, so it needs one with weights.
    """

    projected: ClassVar[bool] = True
    found_by_running: ClassVar[bool] = False
    layers: Layers = "auto"

    @abstractmethod
    def find(self, model: PreTrainedModel) -> Layered:
        """Return the taps of each layer of each of the model's layer stacks, None for a layer without any."""

    @abstractmethod
    def rows(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], counted: Tensor) -> Tensor:
        """Return the loss of each row, (rows,), for one pair of layers.

        student, teacher: one tensor per tap, (rows, tokens, features).  counted: (rows, tokens), true for the tokens
        that are compared.
        """


@dataclass(frozen=True, config=FORBID)
class VectorLoss(FeatureLoss):
    """A loss that compares one vector per token."""

    distance: Distance = "mse"

    def rows(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], counted: Tensor) -> Tensor:
        """Return ``vector_distance``, as a mean over each row's tokens."""
        return mean_of_counted(vector_distance(student[0], teacher[0], self.distance), counted)


def vector_distance(student: Tensor, teacher: Tensor, distance: Distance) -> Tensor:
    """Return the mean squared difference, or one minus the cosine, of the vectors in the last dimension."""
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    if distance == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().mean(-1)


def mean_of_counted(values: Tensor, counted: Tensor) -> Tensor:
    """Return each row's mean over the counted tokens; 0 for a row without any.  values, counted: (rows, tokens)."""
    return torch.where(counted, values, 0).sum(-1) / counted.sum(-1).clamp_min(1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is if it is in float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def is_decoder(model: PreTrainedModel, stack: LayerStack | str) -> bool:
    """Tell whether a layer stack runs on the decoder's tokens of an encoder-decoder."""
    name = stack if isinstance(stack, str) else stack.name
    return bool(model.config.is_encoder_decoder) and "decoder" in name.split(".")


def stacks_by_layer(model: PreTrainedModel, found: dict[tuple[str, int], tuple[Tap, ...]]) -> Layered:
    """Sort taps that were found by (stack, layer) into the model's stacks; a stack without any is left out."""
    stacks = [[found.get((stack.name, layer)) for layer in range(len(stack))] for stack in layer_stacks(model)]
    return [stack for stack in stacks if any(stack)]
