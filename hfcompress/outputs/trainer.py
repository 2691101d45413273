"""A Trainer in whose steps every labelled item weighs the same, however a batch is split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hfcompress.errors import ModelError
from hfcompress.outputs import Classes, Outputs, outputs_of, require_columns


class PerItemTrainer(Trainer):
    """Train on the task loss, summed over labelled items and divided by their number in the whole optimizer step.

    Heads that return a mean whatever they are told (transformers#47688) get the gradients of the undivided batch too,
    with any gradient accumulation, any number of processes, and rows of any length.  What an item is, the kind of the
    model's outputs says: ``outputs``, by default what the model's class and config say.
    Raises ModelError for label smoothing where the loss is not one of classes.
    """

    # compute_loss divides by the items of the whole accumulated batch itself.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, outputs: Outputs | None = None, **kwargs: Any) -> None:
        self.given_kind = outputs
        self.counts: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs)
        self.kind = self._kind()
        if self.args.label_smoothing_factor and not isinstance(self.kind, Classes):
            raise ModelError(
                f"label_smoothing_factor={self.args.label_smoothing_factor} needs a loss of classes, but "
                f"{type(self.model).__name__} gives {self.kind.what}. Set it to 0."
            )

    def _kind(self) -> Outputs:
        return self.given_kind or outputs_of(self.accelerator.unwrap_model(self.model))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect one optimizer step's batches and count what their losses are means of, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.count_step(batches, device)
        return batches, self.counts.get("items")

    def count_step(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        """Set ``counts``, by name and at least 1, for the batches that make one optimizer step."""
        found = [self.counted_in(batch) for batch in batches]
        if not found:  # the data ended with the step before
            return
        local = torch.tensor([list(one.values()) for one in found], device=device).sum(0, keepdim=True)
        self.counts = dict(zip(found[0], self.accelerator.gather(local).sum(0).clamp_min(1)))

    def counted_in(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Return how much of a batch the losses are means of: its labelled items."""
        require_columns(self.kind, batch, "training")
        return {"items": int(self.kind.labelled(batch).sum())}

    def scale(self, name: str) -> Tensor:
        """Return by what a sum over this process's micro-batch is multiplied to be its part of the step's mean.

        DDP averages gradients over processes while ``counts`` are over all of them.
        """
        return self.accelerator.num_processes / self.counts[name]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this batch's part of the whole step's mean in training, its own mean in evaluation."""
        mean, outputs = self.task_mean(model, inputs)
        loss = mean
        if model.training:
            if num_items_in_batch is None:
                self.count_step([inputs], self.args.device)
            loss = self.task_sum(mean, inputs) * self.scale("items")
        return (loss, outputs) if return_outputs else loss

    def task_mean(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Run the model; return the mean of the task loss over the labelled items, NaN where there are none."""
        require_columns(self.kind, inputs, "the task loss")
        if self.kind.own_loss:
            outputs = model(**inputs)
            return self.kind.task_loss(outputs, inputs), outputs
        if self.label_smoother is not None:
            return self._smoothed_mean(model, inputs)
        # A copy: with a loss function of its own the Trainer takes the labels out of it.
        mean, outputs = super().compute_loss(model, dict(inputs), return_outputs=True)
        return mean, outputs

    def _smoothed_mean(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Run the model; return the mean loss with smoothed labels.

        An encoder-decoder makes its decoder's inputs from the labels; from others they are kept.
        """
        seq2seq = self.accelerator.unwrap_model(model).config.is_encoder_decoder
        outputs = model(**{name: one for name, one in inputs.items() if seq2seq or name != "labels"})
        assert self.label_smoother is not None
        return self.label_smoother(outputs, self.kind.labels(inputs)), outputs

    def task_sum(self, mean: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return the sum of the task loss over the labelled items: 0 where there are none, though the mean is NaN."""
        labelled = self.kind.labelled(inputs)
        return torch.where(labelled.any(), mean, 0) * labelled.sum()
