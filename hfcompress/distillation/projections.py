"""Learned projections of the feature losses: trained with the student, kept beside its checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from hfcompress.distillation.matching import FeatureMatcher
from hfcompress.errors import CheckpointError, ModelError

FILE = "distillation_projections.safetensors"


class ProjectionTrainer(Trainer):
    """The part of a Trainer that trains modules which are no part of its model.

    They are in the same optimizer, averaged over processes like the model's gradients, and saved where the
    Trainer's own resume state is, so that a resumed run equals an uninterrupted one.  Gradient clipping sees the
    student's gradients alone.
    """

    matcher: FeatureMatcher | None = None

    @property
    def projections(self) -> nn.ModuleDict:
        """Return the modules by name."""
        return nn.ModuleDict() if self.matcher is None else self.matcher.projections

    @abstractmethod
    def _bind(self) -> None:
        """Find out anew how the student compares with its teachers."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer as the Trainer does, and give it the projections, too."""
        made = self.optimizer is None
        if made and self.model_init is not None:
            self._bind()  # a new student
        optimizer = super().create_optimizer(model)
        known = {id(one) for group in optimizer.param_groups for one in group["params"]}
        added = [one for one in self.projections.parameters() if id(one) not in known]
        if added:
            if not made and self.lr_scheduler is not None:
                raise ModelError(
                    "A scheduler of your own does not know the projections of the feature losses: give the Trainer an "
                    "optimizer class (optimizer_cls_and_kwargs) instead of optimizers."
                )
            optimizer.add_param_group({"params": added, "weight_decay": self.args.weight_decay})
        return optimizer

    def zero_projections(self) -> None:
        """Forget the gradients of the last step; the Trainer does so for its model alone."""
        self.projections.zero_grad()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one micro-batch; after the last of a step, average the projections' gradients over processes."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            for parameter in self.projections.parameters():
                if parameter.grad is not None:
                    parameter.grad.copy_(self.accelerator.reduce(parameter.grad, reduction="mean"))
        return loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if len(self.projections) and self.args.should_save:
            state = {name: one.contiguous() for name, one in self.projections.state_dict().items()}
            save_file(state, Path(output_dir) / FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and len(self.projections):
            file = Path(checkpoint) / FILE
            if not file.is_file():
                raise CheckpointError(
                    f"{checkpoint} has no {FILE}, so it was written without these losses. Resume with the losses that "
                    "it was trained with, or start anew."
                )
            self.projections.load_state_dict(load_file(file))
        super()._load_optimizer_and_scheduler(checkpoint)
