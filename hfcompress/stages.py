"""The glue between a job and the methods: each stage opens a checkpoint, changes the model, and says what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hfcompress.distillation import DistillationConfig, DistillationTrainer
from hfcompress.job import Job
from hfcompress.pruning import PruneCallback, PruneOptions
from hfcompress.pruning.masks import prunable_weights, sparsity_of
from hfcompress.pruning.oneshot import prune
from hfcompress.quantization import quantize
from hfcompress.recipe import Distill, Finetune, Prune, Quantize, Stage
from hfcompress.structure import DropLayers, drop_layers, find_stack
from hfcompress.training import train, training_options

ROWS_FOR_LAYER_CHOICE = 128  # of the training data; a greedy choice by loss runs them once per layer and drop


@dataclass(frozen=True)
class Outcome:
    """What a stage leaves: the model to save, one line about it, and its report if there is one."""

    model: PreTrainedModel
    summary: str
    report: dict[str, Any] | None = None


def run_stage(stage: Stage, job: Job) -> Outcome:
    """Run one stage.  It begins from a saved checkpoint and, by the caller's care, the recipe's seed."""
    return _RUNNERS[stage.kind](job, stage.options, stage.name)


def _drop_layers(job: Job, options: DropLayers, name: str) -> Outcome:
    model = job.open_model()
    before = len(find_stack(model, options.stack))
    calibration = job.training_batches(ROWS_FOR_LAYER_CHOICE) if options.needs_calibration else None
    kept = drop_layers(model, options, calibration)
    return Outcome(model, f"{len(kept)} of {before} layers kept: {', '.join(map(str, kept))}")


def _finetune(job: Job, options: Finetune, name: str) -> Outcome:
    model = job.open_model("float32")
    arguments = TrainingArguments(**training_options(options, job.work, job.recipe.seed))
    trainer = Trainer(model=model, args=arguments, **_data_of(job), callbacks=_pruning(options.prune))
    if job.task.name != "causal-lm":
        # Classification heads return a mean whatever they are told (transformers#47688), so the Trainer must divide.
        trainer.model_accepts_loss_kwargs = False
        trainer.loss_is_scaled_for_ga = False
    train(trainer, name)
    return Outcome(_in_saved_dtype(model, job), _trained(trainer, options.prune))


def _distill(job: Job, options: Distill, name: str) -> Outcome:
    student = job.open_model("float32")
    teacher = job.teacher(options.teacher)
    arguments = DistillationConfig(
        **training_options(options, job.work, job.recipe.seed), temperature=options.temperature, alpha=options.alpha
    )
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=arguments, **_data_of(job), callbacks=_pruning(options.prune)
    )
    train(trainer, name)
    summary = f"teacher {options.teacher}, {_trained(trainer, options.prune)}"
    return Outcome(_in_saved_dtype(student, job), summary)


def _prune(job: Job, options: Prune, name: str) -> Outcome:
    model = job.open_model()
    method = options.method
    calibration = job.calibration_batches(options) if method.needs_calibration else None
    report = prune(model, method, calibration, targets=options.targets, exclude=options.exclude)
    summary = f"{type(method).__name__}, {report.sparsity:.1%} of the targeted weights pruned"
    return Outcome(model, summary + (f" in the pattern {method.pattern}" if method.pattern else ""), report.to_dict())


def _quantize(job: Job, options: Quantize, name: str) -> Outcome:
    model = job.open_model()
    method = options.method
    calibration = job.calibration_batches(options) if method.needs_calibration else None
    report = quantize(model, method, calibration, prune=options.prune)
    per = "row" if method.group_size is None else f"{method.group_size} columns"
    summary = f"{type(method).__name__}, {method.bits} bits, a scale per {per}"
    if options.prune is not None:
        summary += f", {options.prune.pattern or format(options.prune.sparsity, '.1%')} pruned in the same pass"
    return Outcome(model, summary, report.to_dict())


_RUNNERS: dict[str, Callable[[Job, Any, str], Outcome]] = {
    "drop_layers": _drop_layers,
    "prune": _prune,
    "finetune": _finetune,
    "distill": _distill,
    "quantize": _quantize,
}


def _data_of(job: Job) -> dict[str, Any]:
    return {
        "train_dataset": job.source.encoded("train"),
        "eval_dataset": job.source.encoded("held_out"),
        "data_collator": job.task.collator(job.processor),
    }


def _pruning(options: PruneOptions | None) -> list[TrainerCallback]:
    return [] if options is None else [PruneCallback.from_options(options)]


def _trained(trainer: Trainer, pruning: PruneOptions | None) -> str:
    steps = f"{trainer.state.global_step} steps"
    if pruning is None:
        return steps
    assert isinstance(trainer.model, nn.Module)
    reached = sparsity_of(prunable_weights(trainer.model, pruning.targets, pruning.exclude))
    return f"{steps}, {reached:.1%} of the targeted weights pruned"


def _in_saved_dtype(model: PreTrainedModel, job: Job) -> PreTrainedModel:
    """Training runs in float32; between stages a model has the dtype of the checkpoint that the recipe began with.

    Buffers that are not saved (rotary frequencies) stay in float32, as they are after a reload.
    """
    dtype = job.saved_dtype()
    if isinstance(dtype, torch.dtype):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model
