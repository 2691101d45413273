"""A teacher that is a model in this process: on any device, in any dtype, quantized or not."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.distillation.losses.taps import Tap, tapped
from hfcompress.distillation.teachers.base import Answer, Teacher
from hfcompress.outputs import Outputs, outputs_of


class LiveTeacher(Teacher):
    """Runs a model in evaluation mode without gradients, where it is and in its own dtype."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.classes = outputs_of(model).size(model)
        model.requires_grad_(False)
        model.eval()

    @property
    def columns(self) -> set[str]:
        """Return the arguments of the model's forward."""
        return forward_arguments(self.model)

    def place_on(self, device: torch.device) -> None:
        """Move the model, unless ``device_map`` placed it or it is quantized."""
        placed = getattr(self.model, "hf_device_map", None) is not None
        if not placed and not getattr(self.model, "is_quantized", False):
            nn.Module.to(self.model, device)

    @torch.no_grad()
    def answer(self, inputs: Mapping[str, Any], kind: Outputs, rows: Tensor | None, taps: Sequence[Tap]) -> Answer:
        """Run the model on the columns that it takes, without the labels."""
        device = self.model.device
        accepted = self.columns - set(kind.label_columns)
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items() if k in accepted}
        if self.model.config.is_encoder_decoder and "decoder_input_ids" not in moved and "labels" in inputs:
            moved.update(self._decoder_inputs(inputs["labels"].to(device)))
        with tapped(self.model, taps) as features:
            outputs = self.model(**moved)
        found = {tap: features[tap] for tap in taps}
        if rows is None:
            return Answer(None, None, None, found)
        logits = kind.logits(outputs, inputs)
        shape = tuple(logits.shape[:-1])
        return Answer(logits.reshape(-1, logits.shape[-1]), rows.to(logits.device), shape, found)

    def _decoder_inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """An encoder-decoder makes its decoder's inputs from the labels; its own task loss is not needed for that."""
        shift: Any = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        return {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels=labels)}


def forward_arguments(model: nn.Module) -> set[str]:
    """Return the names of the arguments that a model's forward takes."""
    return set(inspect.signature(model.forward).parameters)
