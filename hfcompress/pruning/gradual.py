"""What all gradual pruning does at the Trainer's events; which weights go, and by what, each kind says itself."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hfcompress.callbacks import handler_of, peers_of, read_options, refuse_sharding, trainer_of, unwrapped
from hfcompress.errors import HFCompressError
from hfcompress.evaluated import note_evaluation
from hfcompress.pruning import checks
from hfcompress.pruning import masks as masking
from hfcompress.pruning.criteria import Criterion
from hfcompress.pruning.evidence import Evidence
from hfcompress.pruning.inputs import InputSums, Watch, sum_of_squares
from hfcompress.pruning.leftovers import remove_leftovers
from hfcompress.pruning.optimizers import clear_moments_, keeps_zeros
from hfcompress.pruning.options import GradualOptions
from hfcompress.pruning.reporting import has_logged, log_shares
from hfcompress.pruning.schedules import SCHEDULES, last_update, ramp

logger = logging.get_logger(__name__)
Weights = dict[str, nn.Parameter]
Kind = TypeVar("Kind", bound="GradualPruneCallback")


class GradualPruneCallback(TrainerCallback, ABC):
    """Prune while the Trainer trains: the sparsity is a function of the step alone, and the masks are zeros.

    Subclasses find the weights and choose what goes.  ``_masks`` are True where a weight is kept, and broadcast to it.
    """

    options_type: ClassVar[type[GradualOptions]]
    log_name: ClassVar[str]
    what: ClassVar[str]  # is pruned: the plain word for it
    scored: ClassVar[str] = ""  # what the scores are of; two kinds may score the same weights
    options: GradualOptions

    def __init__(self, sparsity: float = 0.5, **options: Any) -> None:
        self.options = read_options(type(self).__name__, self.options_type, {"sparsity": sparsity, **options})
        self._masks: masking.Masks = {}
        self._evidence: Evidence | None = None
        self._watch: Watch | None = None
        self._hooks: list[Any] = []
        self._is_behind = False

    @classmethod
    def from_options(cls: type[Kind], options: GradualOptions) -> Kind:
        """Make the callback from checked options, as recipes do."""
        return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(options)})

    @abstractmethod
    def _find(self, model: nn.Module) -> Weights:
        """Return the weights to prune by name; raise for a model or options that cannot be pruned rightly."""

    @abstractmethod
    def _criterion(self, seed: int, model: nn.Module) -> Criterion:
        """Make the criterion that the options name."""

    @abstractmethod
    def _rows(self, name: str, tensor: Tensor) -> Tensor:
        """Return a weight, or its gradient, as the criterion takes it."""

    @abstractmethod
    def _masks_from_zeros(self, model: nn.Module, weights: Weights) -> masking.Masks:
        """Return masks that hold today's zeros in place."""

    @abstractmethod
    def _prune(self, weights: Weights, sparsity: float) -> None:
        """Close more in the masks until the sparsity is reached, never more than that."""

    @abstractmethod
    def _reached(self, model: nn.Module, weights: Weights) -> tuple[float, dict[str, float]]:
        """Return the sparsity, counted from the weights, overall and by layer."""

    @abstractmethod
    def _grain(self, weights: Weights) -> float:
        """Return how far the sparsity may stay below the one asked for, since counts are rounded down."""

    def _watching(self, model: nn.Module, weights: Weights, criterion: Criterion) -> Watch:
        """Return what sums the evidence of criteria that need activations, in the steps that prune."""
        return InputSums(model, weights, lambda name, inputs, mask, labels: sum_of_squares(inputs, mask))

    # Parameters are looked up at every event: references from before a wrapper are dead after it.
    def _weights(self, model: nn.Module) -> Weights:
        inner = unwrapped(model)
        return {name: inner.get_parameter(name) for name in self._masks}

    def _fits(self, model: nn.Module) -> bool:
        """Say whether the masks are of this model: not after training, nor of one shrunk after a cut-off run."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return bool(self._masks) and all(
            name in parameters and all(length in (1, size) for length, size in zip(mask.shape, parameters[name].shape))
            for name, mask in self._masks.items()
        )

    def _ramp(self, state: TrainerState) -> tuple[int, int]:
        return ramp(self.options.schedule, self.options.start, self.options.end, state.max_steps)

    def reached(self, model: nn.Module) -> float:
        """Return the share of what is targeted that is pruned in a model now, counted from its weights."""
        return self._reached(model, self._find(model))[0]

    def sparsity_at(self, step: int, state: TrainerState) -> float:
        """Return the target sparsity after ``step`` optimizer steps."""
        first, last = self._ramp(state)
        return SCHEDULES[self.options.schedule](step, first, last, self.options.sparsity)

    def _last_update(self, step: int, state: TrainerState) -> int:
        return last_update(step, *self._ramp(state), self.options.frequency)

    def _is_due(self, step: int, state: TrainerState) -> bool:
        first, last = self._ramp(state)
        return self._is_behind or (first < step <= last and self._last_update(step, state) == step)

    def _misses(self, model: nn.Module, weights: Weights, sparsity: float) -> bool:
        return self._reached(model, weights)[0] < sparsity - self._grain(weights)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the zeros that are there, and keep gradients off them so that clipping sees live weights only."""
        refuse_sharding(args, type(self).__name__)
        self._release()
        self._masks = {}
        model = unwrapped(kwargs["model"])
        handler = handler_of(self)
        running = [one for one in handler.callbacks if isinstance(one, GradualPruneCallback)] if handler else [self]
        remove_leftovers(model, [one._masks for one in running], [one._watch for one in running])
        if isinstance(model, PreTrainedModel):
            model.add_model_tags(["hfcompress", "pruned"])  # what pushes it to the Hub puts them on its card
        weights = self._find(model)
        criterion = self._criterion(args.seed, model)
        self._check(args, model, weights, criterion, kwargs.get("train_dataloader"))
        self._evidence = Evidence(criterion, self.scored + self.options.criterion, weights, self._rows)
        self._evidence.restore(kwargs["optimizer"], state)
        if criterion.needs_activations:
            self._watch = self._watching(model, weights, criterion)
        self._masks.update(self._masks_from_zeros(model, weights))
        # The hook runs before DDP averages gradients and before clipping, and again after every accumulation.
        for name, weight in weights.items():
            if weight.requires_grad:
                self._hooks.append(weight.register_post_accumulate_grad_hook(masking.GradientMask(self._masks, name)))
        # Before anything is pruned here: what was evaluated and saved so far was denser than it should have been.
        wanted = self.sparsity_at(self._last_update(state.global_step, state), state)
        self._is_behind = state.global_step > 0 and self._misses(model, weights, wanted)
        if self.options.schedule == "constant":
            self._prune(weights, self.options.sparsity)
        masking.apply_masks_(weights, self._masks)
        clear_moments_(kwargs["optimizer"], weights, self._masks)

    def _check(
        self, args: TrainingArguments, model: nn.Module, weights: Weights, criterion: Criterion, data: Any
    ) -> None:
        checks.refuse_nan(weights)
        others = [one for one in peers_of(self) if isinstance(one, GradualPruneCallback) and one is not self]
        checks.refuse_overlap(weights, [one._find(model) for one in others], type(self).__name__)
        if criterion.needs_gradient:
            checks.refuse_frozen(weights, self.options.criterion)
        if criterion.needs_activations:
            checks.refuse_replicas(args, self.options.criterion)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch what the layers see in the steps that prune, if the criterion asks for it."""
        if self._watch is not None:
            self._watch.active = self._is_due(state.global_step + 1, state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the criterion the step's gradients: averaged over all batches and processes, unscaled, clipped."""
        assert self._evidence is not None
        if self._evidence.criterion.needs_gradient and (self._is_behind or state.global_step < self._ramp(state)[1]):
            self._evidence.observe_gradients(self._weights(kwargs["model"]), kwargs["optimizer"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune more where the schedule says so, and zero again what the optimizer may have moved.

        The event comes before ``global_step`` is counted up, and before evaluation and saving.
        """
        assert self._evidence is not None
        step = state.global_step + 1
        due = self._is_due(step, state)
        if due:
            self._prune_now(step, state, kwargs["model"], kwargs["optimizer"])
        elif not keeps_zeros(kwargs["optimizer"]):
            masking.apply_masks_(self._weights(kwargs["model"]), self._masks)
        self._evidence.belongs_to(step)
        if due or step <= self._ramp(state)[1]:
            # Best so far would mean denser: neither load_best_model_at_end nor early stopping may choose by it.
            state.best_metric = None
            state.best_global_step = None
            state.best_model_checkpoint = None

    def _prune_now(self, step: int, state: TrainerState, model: nn.Module, optimizer: Any) -> None:
        assert self._evidence is not None
        weights = self._weights(model)
        if self._watch is not None:
            self._evidence.observe_sums(weights, self._watch.take())
        masking.apply_masks_(weights, self._masks)
        # Nothing observed yet, because the gradient scaler skipped every step so far: prune at the next one.
        self._is_behind = not self._evidence.is_ready
        if not self._is_behind:
            # Zeros that another callback made here count for this one, too.
            self._masks.update(self._masks_from_zeros(unwrapped(model), weights))
            self._prune(weights, self.sparsity_at(step, state))
            clear_moments_(optimizer, weights, self._masks)
            masking.apply_masks_(weights, self._masks)
            # Layers that did not run so far kept everything: what they lack is made up for once they have.
            self._is_behind = bool(self._evidence.unseen) and self._misses(
                unwrapped(model), weights, self.sparsity_at(step, state)
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Zero the pruned weights before they are evaluated or saved, whatever else moved them."""
        if control.should_evaluate or control.should_save:
            masking.apply_masks_(self._weights(kwargs["model"]), self._masks)

    # Evaluations and checkpoints of an epoch's end come after callbacks that may write weights there.
    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the masks from the weights, as a run resumed from this checkpoint will."""
        if self._masks:
            weights = self._weights(kwargs["model"])
            self._masks.update(self._masks_from_zeros(unwrapped(kwargs["model"]), weights))
            clear_moments_(kwargs["optimizer"], weights, self._masks)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the sparsity beside the metrics, overall and per layer, and which weights they are of."""
        note_evaluation(trainer_of(self), kwargs["metrics"])
        self._log_shares(args, state, control, kwargs["model"])

    def _log_shares(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any) -> None:
        """Log what was counted from the weights; nothing of a model that has nothing to prune, as a packed one."""
        model = unwrapped(model)
        try:
            weights = self._weights(model) if self._fits(model) else self._find(model)
        except HFCompressError:
            return
        log_shares(self, self.log_name, *self._reached(model, weights), args, state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the sparsity with the training's summary, unless an evaluation of the last step did."""
        # Not in on_train_end: reporting callbacks, which come before this one, have closed their files by then.
        if "train_runtime" in kwargs["logs"] and not has_logged(self, self.log_name, state):
            self._log_shares(args, state, control, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so if the run ended before the target was reached, and take the hooks off."""
        model, weights = unwrapped(kwargs["model"]), self._weights(kwargs["model"])
        unseen = [] if self._evidence is None else self._evidence.unseen
        if self._misses(model, weights, self.options.sparsity):
            never = f" Nothing was observed of {checks.some(unseen)}, which stay dense." if unseen else ""
            logger.warning(
                f"{type(self).__name__}: training ended at step {state.global_step} with sparsity "
                f"{self._reached(model, weights)[0]:.3f}, below the target {self.options.sparsity}, "
                f"which the schedule reaches at step {self._ramp(state)[1]}.{never}"
            )
        if self._evidence is not None:
            self._evidence.remove_from(kwargs["optimizer"])
        self._release()
        self._masks = {}

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
