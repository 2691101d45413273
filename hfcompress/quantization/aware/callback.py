"""Quantization-aware training as a Trainer callback."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hfcompress.callbacks import (
    peers_of,
    read_options,
    refuse_sharding,
    refuse_split_weights,
    trainer_of,
    unwrapped,
)
from hfcompress.errors import HFCompressError, ModelError
from hfcompress.evaluated import note_evaluation
from hfcompress.quantization.apply import quantize
from hfcompress.quantization.aware.layers import FakeQuantized, fake_quantize_, restore_dense_
from hfcompress.quantization.aware.options import QuantizeAwareOptions
from hfcompress.quantization.options import RTN
from hfcompress.quantization.plan import plan_linears
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.report import QuantizationReport

logger = logging.get_logger(__name__)
Model = TypeVar("Model", bound=PreTrainedModel)


class QuantizeAwareCallback(TrainerCallback):
    """Train a model for the grid that it will be quantized on (Jacob et al., arXiv 1712.05877).

    ``Trainer(..., callbacks=[QuantizeAwareCallback(bits=4, group_size=64)])``; see ``QuantizeAwareOptions`` for all
    options.  Every forward pass, also in evaluation, computes with the weights that ``RTN`` of the same options would
    write, scales chosen anew each time; the gradient goes to the weights themselves as if they were not rounded
    (straight-through).  The optimizer, the checkpoints and ``trainer.save_model`` have the unrounded weights under
    their own names, so a run resumes from any checkpoint with no special flag.
    After training the model still rounds, so ``trainer.evaluate()`` measures what it will be.
    ``callback.export(model)``, or ``hfcompress.quantize(model, callback.method)``, packs it: exactly the weights that
    it computed with.
    Zeros stay zeros in rounding; to keep them while training, use ``PruneCallback(sparsity=0)`` beside it.
    Raises HFCompressError for a wrong option, and before the first step for a model that cannot be quantized so.
    """

    def __init__(self, bits: int = 4, **options: Any) -> None:
        self.options = read_options(type(self).__name__, QuantizeAwareOptions, {"bits": bits, **options})
        self._planned: Sequence[PlannedLinear] = ()

    @property
    def method(self) -> RTN:
        """Return the method that quantizes the trained model exactly."""
        return self.options.method

    def _first(self, state: TrainerState) -> int:
        """Return how many steps are trained before anything is rounded."""
        return math.ceil(self.options.start * state.max_steps)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the layers, and raise for what cannot be quantized."""
        kind, model = type(self).__name__, unwrapped(kwargs["model"])
        refuse_sharding(args, kind)
        refuse_split_weights(model, kind)
        if len(peers_of(self)) > 1:
            raise HFCompressError(f"There are {len(peers_of(self))} {kind}s; one model is quantized once: use one.")
        if not isinstance(model, PreTrainedModel):
            raise ModelError(f"{kind} needs a Transformers model, not {type(model).__name__}.")
        restore_dense_(model)
        self._planned = plan_linears(model, self.options)
        self._round_when_due(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to round where the options say so."""
        self._round_when_due(state)

    def _round_when_due(self, state: TrainerState) -> None:
        if self._planned and state.global_step >= self._first(state):
            for one in self._planned:
                fake_quantize_(one, self.options.scale, self.options.torch_dtype)
            self._planned = ()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let no model be chosen as the best by a score that it had before it was rounded."""
        # The event comes before the step is counted and its model evaluated: the first rounded one starts anew.
        if 0 < self._first(state) >= state.global_step:
            state.best_metric = None
            state.best_global_step = None
            state.best_model_checkpoint = None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write into the log which weights the metrics are of: rounded ones, as ``export`` packs them."""
        note_evaluation(trainer_of(self), kwargs["metrics"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so if the run ended before anything was rounded."""
        if self._planned:
            logger.warning(
                f"{type(self).__name__}: training ended at step {state.global_step}, before step {self._first(state)} "
                f"from which start={self.options.start:g} has weights rounded: the model was not trained for its grid."
            )
            self._planned = ()

    def export(self, model: PreTrainedModel) -> QuantizationReport:
        """Pack the trained model in place; plain ``save_pretrained`` then writes a compressed-tensors checkpoint.

        The packed weights are those that the model computed with.  With the option ``dtype``, its other parameters
        are rounded to that dtype, too.  Raises ModelError for a model that this callback has not trained.
        """
        if not any(isinstance(module, FakeQuantized) for module in model.modules()):
            raise ModelError(
                f"{type(model).__name__} has no layer that rounds its weight: train it with this callback first, or "
                "call hfcompress.quantize for a model that was trained without it."
            )
        to_dtype_(model, self.options)
        return quantize(model, self.method)


def to_dtype_(model: nn.Module, options: QuantizeAwareOptions) -> None:
    """Round all parameters to the dtype of the checkpoint; buffers that are not saved stay as they are."""
    if options.torch_dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(options.torch_dtype)
