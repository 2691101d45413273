"""Gradual pruning as a Trainer callback."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hfcompress.errors import HFCompressError, did_you_mean
from hfcompress.pruning import masks as masking
from hfcompress.pruning.options import PruneOptions
from hfcompress.pruning.schedules import SCHEDULES

logger = logging.get_logger(__name__)
DEFAULT_UPDATES = 50


class PruneCallback(TrainerCallback):
    """Prune weights gradually while the Trainer trains (Zhu and Gupta, arXiv 1710.01878).

    ``Trainer(..., callbacks=[PruneCallback])`` works with the defaults; ``PruneCallback(sparsity=0.8)`` sets options:
    see ``PruneOptions`` for all of them.  The sparsity is a function of ``state.global_step`` alone and the masks are
    the weights' own zeros, so a run resumes from any checkpoint with no special flag.
    Raises HFCompressError for a wrong option, and before the first step for a set-up it cannot prune rightly.
    """

    def __init__(self, sparsity: float = 0.5, **options: Any) -> None:
        known = [field.name for field in dataclasses.fields(PruneOptions)]
        for name in options:
            if name not in known:
                raise HFCompressError(
                    f"PruneCallback has no option '{name}'. {did_you_mean(name, known)}Known: {', '.join(known)}."
                )
        try:
            self.options = PruneOptions(sparsity=sparsity, **options)
        except ValueError as error:
            raise HFCompressError(f"PruneCallback: {error}") from error
        self._masks: masking.Masks = {}
        self._hooks: list[Any] = []

    @classmethod
    def from_options(cls, options: PruneOptions) -> PruneCallback:
        """Make the callback from checked options, as recipes do."""
        return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(options)})

    # The model is looked up at every event: references from before a wrapper are dead after it.
    def _weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return masking.prunable_weights(_unwrapped(model), self.options.targets, self.options.exclude)

    def _ramp(self, state: TrainerState) -> tuple[int, int]:
        """Return the steps between which the sparsity rises; the last one lies inside the run."""
        first = int(self.options.start * state.max_steps)
        return first, min(max(first + 1, round(self.options.end * state.max_steps)), state.max_steps)

    def sparsity_at(self, step: int, state: TrainerState) -> float:
        """Return the target sparsity after ``step`` optimizer steps."""
        first, last = self._ramp(state)
        return SCHEDULES[self.options.schedule](step, first, last, self.options.sparsity)

    def _is_due(self, step: int, state: TrainerState) -> bool:
        first, last = self._ramp(state)
        every = self.options.frequency or max(1, (last - first) // DEFAULT_UPDATES)
        return first < step <= last and ((step - first) % every == 0 or step == last)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the zeros that are there, and keep gradients off them so that clipping sees live weights only."""
        _refuse_sharding(args)
        weights = self._weights(kwargs["model"])
        _refuse_nan(weights)
        self._masks = masking.masks_from_zeros(weights)
        self._remove_hooks()
        # A hook on the tensor runs before the gradient is accumulated, so before DDP averages it and before clipping.
        for name, weight in weights.items():
            if weight.requires_grad:
                self._hooks.append(weight.register_hook(functools.partial(self._masked_gradient, name)))

    def _masked_gradient(self, name: str, gradient: Tensor) -> Tensor:
        return gradient * self._masks[name]

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Zero the pruned weights again and, where the schedule says so, prune more.

        The event comes before ``global_step`` is counted up, and before evaluation and saving.
        """
        weights = self._weights(kwargs["model"])
        step = state.global_step + 1
        if self._is_due(step, state):
            # Optimizers without elementwise updates move pruned weights, so the old masks go first.
            masking.apply_masks_(weights, self._masks)
            self._masks = masking.magnitude_masks(
                weights, self.sparsity_at(step, state), self.options.criterion, self.options.scope
            )
            masking.clear_moments_(kwargs["optimizer"], weights, self._masks)
        masking.apply_masks_(weights, self._masks)
        if step <= self._ramp(state)[1]:
            # Best so far would mean denser: neither load_best_model_at_end nor early stopping may choose by it.
            state.best_metric = None
            state.best_global_step = None
            state.best_model_checkpoint = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the masks from the weights, as a run resumed from this checkpoint will."""
        self._masks = masking.masks_from_zeros(self._weights(kwargs["model"]))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the sparsity beside the metrics, counted from the weights."""
        if state.log_history:
            state.log_history[-1]["sparsity"] = masking.sparsity_of(self._weights(kwargs["model"]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so if the run ended before the target was reached, and take the gradient hooks off."""
        self._remove_hooks()
        weights = self._weights(kwargs["model"])
        reached = masking.sparsity_of(weights)
        # Counts are rounded down, at most one weight per group.
        groups = 1 if self.options.scope == "global" else len(weights)
        allowance = groups / sum(weight.numel() for weight in weights.values())
        if reached < self.options.sparsity - allowance:
            logger.warning(
                f"PruneCallback: training ended at step {state.global_step} with sparsity {reached:.3f}, "
                f"below the target {self.options.sparsity}, which the schedule reaches at step {self._ramp(state)[1]}."
            )


def _unwrapped(model: nn.Module) -> nn.Module:
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model)


def _refuse_sharding(args: TrainingArguments) -> None:
    from accelerate.state import DistributedType, PartialState

    # A launcher can choose sharding behind the arguments' back: `accelerate launch --use_fsdp`.
    launched = PartialState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if launched or args.deepspeed or getattr(args, "fsdp", None):
        raise HFCompressError(
            "PruneCallback needs whole weights on every device, but FSDP or DeepSpeed shards them. "
            "Train with DDP or on one device."
        )


def _refuse_nan(weights: dict[str, nn.Parameter]) -> None:
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise HFCompressError(f"Weight '{name}' holds NaN or infinite values, so it has no order to prune by.")
