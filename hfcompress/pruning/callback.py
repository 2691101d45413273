"""Gradual pruning as a Trainer callback."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hfcompress.errors import HFCompressError, did_you_mean
from hfcompress.pruning import checks
from hfcompress.pruning import masks as masking
from hfcompress.pruning.criteria import criterion_of
from hfcompress.pruning.evidence import Evidence
from hfcompress.pruning.inputs import InputSquares
from hfcompress.pruning.options import PruneOptions
from hfcompress.pruning.patterns import Blocks
from hfcompress.pruning.reporting import handler_of, peers_of
from hfcompress.pruning.schedules import SCHEDULES, last_update, ramp
from hfcompress.pruning.targets import as_rows, lies_transposed

logger = logging.get_logger(__name__)


class PruneCallback(TrainerCallback):
    """Prune weights gradually while the Trainer trains (Zhu and Gupta, arXiv 1710.01878).

    ``Trainer(..., callbacks=[PruneCallback])`` works with the defaults; ``PruneCallback(sparsity=0.8)`` sets options:
    see ``PruneOptions`` for all of them.  The sparsity is a function of ``state.global_step`` alone, the masks are the
    weights' own zeros, and what a criterion has observed lies in the optimizer's checkpoint, so a run resumes from any
    checkpoint with no special flag.  Zeros that are there when training begins stay: ``sparsity=0`` trains a sparse
    model further and adds none.  Several callbacks may prune weights of their own.
    Every evaluation logs ``sparsity`` and ``sparsity/LAYER`` to the Trainer's log and to what ``report_to`` names; the
    first of several callbacks logs ``sparsity_1``, the next ``sparsity_2``.
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
        self._transposed: set[str] = set()
        self._evidence: Evidence | None = None
        self._inputs: InputSquares | None = None
        self._hooks: list[Any] = []
        self._is_behind = False

    @classmethod
    def from_options(cls, options: PruneOptions) -> PruneCallback:
        """Make the callback from checked options, as recipes do."""
        return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(options)})

    # Parameters are looked up at every event: references from before a wrapper are dead after it.
    def _weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        inner = _unwrapped(model)
        if self._masks:
            return {name: inner.get_parameter(name) for name in self._masks}
        return masking.prunable_weights(inner, self.options.targets, self.options.exclude)

    def _ramp(self, state: TrainerState) -> tuple[int, int]:
        return ramp(self.options.schedule, self.options.start, self.options.end, state.max_steps)

    def sparsity_at(self, step: int, state: TrainerState) -> float:
        """Return the target sparsity after ``step`` optimizer steps."""
        first, last = self._ramp(state)
        return SCHEDULES[self.options.schedule](step, first, last, self.options.sparsity)

    def _last_update(self, step: int, state: TrainerState) -> int:
        return last_update(step, *self._ramp(state), self.options.frequency)

    def _is_due(self, step: int, state: TrainerState) -> bool:
        first, last = self._ramp(state)
        return self._is_behind or (first < step <= last and self._last_update(step, state) == step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the zeros that are there, and keep gradients off them so that clipping sees live weights only."""
        checks.refuse_sharding(args)
        self._release()
        self._masks = {}
        model = _unwrapped(kwargs["model"])
        weights = self._weights(model)
        self._transposed = {n for n in weights if lies_transposed(model.get_submodule(n.rpartition(".")[0]))}
        self._check(args, model, weights)
        criterion = criterion_of(self.options.criterion, args.seed)
        self._evidence = Evidence(criterion, self.options.criterion, weights, self._transposed)
        self._evidence.restore(kwargs["optimizer"], state)
        if criterion.needs_activations:
            self._inputs = InputSquares(model, weights)
        self._masks = masking.masks_from_zeros(weights)
        # The hook runs before DDP averages gradients and before clipping, and again after every accumulation.
        for name, weight in weights.items():
            if weight.requires_grad:
                self._hooks.append(weight.register_post_accumulate_grad_hook(masking.GradientMask(self._masks, name)))
        if self.options.schedule == "constant":
            self._prune(weights, self.options.sparsity)
        masking.apply_masks_(weights, self._masks)
        masking.clear_moments_(kwargs["optimizer"], weights, self._masks)
        wanted = self.sparsity_at(self._last_update(state.global_step, state), state)
        self._is_behind = state.global_step > 0 and self._misses(weights, wanted)

    def _check(self, args: TrainingArguments, model: nn.Module, weights: dict[str, nn.Parameter]) -> None:
        checks.refuse_nan(weights)
        checks.refuse_misfits(weights, self.options, self._transposed)
        others = [one.options for one in peers_of(self) if isinstance(one, PruneCallback) and one is not self]
        checks.refuse_overlap(weights, [masking.prunable_weights(model, one.targets, one.exclude) for one in others])
        criterion = criterion_of(self.options.criterion, args.seed)
        if criterion.needs_gradient:
            checks.refuse_frozen(weights, self.options.criterion)
        if criterion.needs_activations:
            checks.refuse_replicas(args)
        for name, weight in weights.items():
            if not bool(weight.any()):
                logger.warning(f"PruneCallback: '{name}' is all zero, so all of it counts as pruned and stays zero.")

    def _misses(self, weights: dict[str, nn.Parameter], sparsity: float) -> bool:
        """Say whether the weights are denser than asked; counts are rounded down, at most one unit per group."""
        groups = 1 if self.options.scope == "global" else len(weights)
        pattern = self.options.parsed_pattern()
        unit = max(pattern.size(m.shape[1]) for m in self._rows().values()) if isinstance(pattern, Blocks) else 1
        total = sum(weight.numel() for weight in weights.values())
        return masking.sparsity_of(weights) < sparsity - groups * unit / total

    def _rows(self) -> masking.Masks:
        return {name: as_rows(mask, name in self._transposed) for name, mask in self._masks.items()}

    def _prune(self, weights: dict[str, nn.Parameter], sparsity: float) -> None:
        assert self._evidence is not None
        evidence = self._evidence
        masking.prune_masks_(
            self._rows(),
            lambda name: evidence.scores(name, weights[name]),
            sparsity,
            self.options.scope,
            self.options.parsed_pattern(),
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch what the linear layers see in the steps that prune, if the criterion asks for it."""
        if self._inputs is not None:
            self._inputs.active = self._is_due(state.global_step + 1, state)

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
        """Zero the pruned weights again and, where the schedule says so, prune more.

        The event comes before ``global_step`` is counted up, and before evaluation and saving.
        """
        assert self._evidence is not None
        weights = self._weights(kwargs["model"])
        step = state.global_step + 1
        due = self._is_due(step, state)
        if due and self._inputs is not None:
            self._evidence.observe_inputs(weights, self._inputs.take())
        if due:
            # Nothing observed yet, because the gradient scaler skipped every step so far: prune at the next one.
            self._is_behind = not self._evidence.is_ready
            if not self._is_behind:
                self._prune(weights, self.sparsity_at(step, state))
                masking.clear_moments_(kwargs["optimizer"], weights, self._masks)
        self._evidence.belongs_to(step)
        masking.apply_masks_(weights, self._masks)
        if due or step <= self._ramp(state)[1]:
            # Best so far would mean denser: neither load_best_model_at_end nor early stopping may choose by it.
            state.best_metric = None
            state.best_global_step = None
            state.best_model_checkpoint = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the masks from the weights, as a run resumed from this checkpoint will."""
        if self._masks:
            self._masks.update(masking.masks_from_zeros(self._weights(kwargs["model"])))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the sparsity beside the metrics, overall and per layer, counted from the weights."""
        model = _unwrapped(kwargs["model"])
        weights = self._weights(model)
        peers = peers_of(self)
        name = "sparsity" if len(peers) == 1 else f"sparsity_{1 + [one is self for one in peers].index(True)}"
        layers = masking.sparsity_by_layer(model, weights)
        logs = {name: masking.sparsity_of(weights), **{f"{name}/{layer}": share for layer, share in layers.items()}}
        if state.log_history:
            state.log_history[-1].update(logs)
        handler = handler_of(self)
        if handler is not None:
            handler.on_log(args, state, control, logs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so if the run ended before the target was reached, and take the hooks off."""
        weights = self._weights(kwargs["model"])
        if self._misses(weights, self.options.sparsity):
            logger.warning(
                f"PruneCallback: training ended at step {state.global_step} with sparsity "
                f"{masking.sparsity_of(weights):.3f}, below the target {self.options.sparsity}, "
                f"which the schedule reaches at step {self._ramp(state)[1]}."
            )
        if self._evidence is not None:
            self._evidence.remove_from(kwargs["optimizer"])
        self._release()
        self._masks = {}

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._inputs is not None:
            self._inputs.remove()
            self._inputs = None


def _unwrapped(model: nn.Module) -> nn.Module:
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)
