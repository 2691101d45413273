"""The glue between a job and the methods: each stage opens a checkpoint, changes the model, and says what it did."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hfcompress.distillation import CachedTeacher, DistillationConfig, DistillationTrainer
from hfcompress.distillation.crossing import crossing_loss
from hfcompress.distillation.losses import named
from hfcompress.distillation.pairs import tokenizer_of
from hfcompress.job import Job
from hfcompress.outputs.trainer import PerItemTrainer
from hfcompress.pruning import HeadPruneCallback, NeuronPruneCallback, PruneCallback
from hfcompress.pruning.gradual import GradualPruneCallback
from hfcompress.pruning.oneshot import prune
from hfcompress.quantization import QuantizeAwareCallback, quantize
from hfcompress.recipe import Distill, Finetune, Prune, PruneVocabulary, Quantize, Shrink, Stage
from hfcompress.structure import DropLayers, drop_layers, find_stack, shrink
from hfcompress.training import train, training_options
from hfcompress.vocabulary import prune_vocabulary

ROWS_FOR_LAYER_CHOICE = 128  # of the training data; a greedy choice by loss runs them once per layer and drop


@dataclass(frozen=True)
class Outcome:
    """What a stage leaves: the model to save, one line about it, and its report if there is one.

    report_file: what the report is called beside the checkpoint; None keeps it with the run's own facts.
    """

    model: PreTrainedModel
    summary: str
    report: dict[str, Any] | None = None
    report_file: str | None = None
    processor: Any = None  # where the stage changed the tokenizer


def run_stage(stage: Stage, job: Job) -> Outcome:
    """Run one stage.  It begins from a saved checkpoint and, by the caller's care, the recipe's seed."""
    return _RUNNERS[stage.kind](job, stage.options, stage.name)


def _drop_layers(job: Job, options: DropLayers, name: str) -> Outcome:
    model = job.open_model()
    before = len(find_stack(model, options.stack))
    calibration = job.training_batches(ROWS_FOR_LAYER_CHOICE) if options.needs_calibration else None
    kept = drop_layers(model, options, calibration)
    return Outcome(model, f"{len(kept)} of {before} layers kept: {', '.join(map(str, kept))}")


def _prune_vocabulary(job: Job, options: PruneVocabulary, name: str) -> Outcome:
    model, tokenizer = job.open_model(), copy.deepcopy(job.processor)
    done = prune_vocabulary(model, tokenizer, job.source.texts(), keep_extra=options.keep)
    return Outcome(model, done.summary, processor=tokenizer)


def _finetune(job: Job, options: Finetune, name: str) -> Outcome:
    model = job.open_model("float32")
    arguments = TrainingArguments(**training_options(options, job.work, job.recipe.seed))
    pruning, aware = _pruning(options), _quantize_aware(options, job)
    trainer = PerItemTrainer(model=model, args=arguments, **_data_of(job), callbacks=[*pruning, *aware])
    train(trainer, name, options.dropout, _events(job, name))
    return _finished(model, job, _trained(trainer, pruning), aware)


def _distill(job: Job, options: Distill, name: str) -> Outcome:
    student = job.open_model("float32")
    teachers = [job.teacher(name) for name in options.teachers]
    arguments = DistillationConfig(
        **training_options(options, job.work, job.recipe.seed),
        temperature=options.temperature, alpha=options.alpha, losses=options.losses, on_policy=options.on_policy,
    )  # fmt: skip
    pruning, aware = _pruning(options), _quantize_aware(options, job)
    trainer = DistillationTrainer(
        model=student, teacher_model=teachers, teacher_weights=options.teacher_weights, args=arguments,
        **_data_of(job), **_tokenizers(job, options, student, teachers), callbacks=[*pruning, *aware],
    )  # fmt: skip
    # It was for comparing the models: a Trainer that has one writes its special tokens into the student's config.
    trainer.processing_class = None
    train(trainer, name, options.dropout, _events(job, name))
    summary = f"teacher {' and '.join(options.teachers)}, {_trained(trainer, pruning)}"
    return _finished(student, job, summary, aware)


def _prune(job: Job, options: Prune, name: str) -> Outcome:
    model = job.open_model()
    method = options.method
    calibration = job.calibration_batches(options) if method.needs_calibration else None
    report = prune(model, method, calibration, targets=options.targets, exclude=options.exclude)
    return Outcome(model, options.summary_of(report.sparsity), report.to_dict(), report.file_name)


def _shrink(job: Job, options: Shrink, name: str) -> Outcome:
    model = job.open_model()
    report = shrink(model, inputs=job.example(model))
    return Outcome(model, report.summary, dataclasses.asdict(report))


def _quantize(job: Job, options: Quantize, name: str) -> Outcome:
    model = job.open_model()
    method = options.method
    calibration = job.calibration_batches(options) if method.needs_calibration else None
    report = quantize(model, method, calibration, prune=options.prune, shards=job.work / "layers")
    return Outcome(model, options.summary, report.to_dict(), report.file_name)


_RUNNERS: dict[str, Callable[[Job, Any, str], Outcome]] = {
    "drop_layers": _drop_layers,
    "prune_vocabulary": _prune_vocabulary,
    "prune": _prune,
    "finetune": _finetune,
    "distill": _distill,
    "shrink": _shrink,
    "quantize": _quantize,
}


def _data_of(job: Job) -> dict[str, Any]:
    return {
        "train_dataset": job.source.encoded("train"),
        "eval_dataset": job.source.encoded("held_out"),
        "data_collator": job.collator(),
        "outputs": job.task.outputs(job.recipe.data),
    }


def _tokenizers(
    job: Job, options: Distill, student: PreTrainedModel, teachers: Sequence[PreTrainedModel | Path]
) -> dict[str, Any]:
    """Return the tokenizers that the trainer needs: of teachers that read texts in tokens of their own, theirs.

    Otherwise they show that models whose vocabularies are padded differently have one tokenizer, which was compared
    before the first stage.
    """
    if not job.task.predicts_tokens:
        return {}
    if crossing_loss(named(options.losses or ())) is not None:
        theirs = [job.teacher_processor(name) for name in options.teachers]
        return {"processing_class": job.processor, "teacher_processing_class": theirs}
    sizes = {_vocabulary_size(one) for one in (student, *teachers)}
    own = tokenizer_of(job.processor)
    return {"processing_class": own, "teacher_processing_class": own} if len(sizes) > 1 else {}


def _vocabulary_size(model: PreTrainedModel | Path) -> int | None:
    """Return how many tokens a model knows, or the model whose answers are in a folder."""
    if isinstance(model, Path):
        return CachedTeacher(model).classes
    return int(model.config.get_text_config().vocab_size)


def _events(job: Job, name: str) -> Path:
    """Return where a stage's events of TensorBoard stay: the folder that it trains in goes when it is done."""
    output = Path(job.recipe.output).expanduser()
    return output.with_name(f"{output.name}.tensorboard") / name


def _pruning(options: Finetune | Distill) -> list[GradualPruneCallback]:
    """Return a callback for each kind of pruning; weights come last, so that zeros of heads and neurons count."""
    callbacks: list[GradualPruneCallback] = []
    if options.prune_heads is not None:
        callbacks.append(HeadPruneCallback.from_options(options.prune_heads))
    if options.prune_neurons is not None:
        callbacks.append(NeuronPruneCallback.from_options(options.prune_neurons))
    if options.prune is not None:
        callbacks.append(PruneCallback.from_options(options.prune))
    return callbacks


def _quantize_aware(options: Finetune | Distill, job: Job) -> list[QuantizeAwareCallback]:
    """Return the callback that trains for few bits, if asked, on the grid in the dtype of the stage's checkpoint."""
    told, saved = options.quantize_aware, job.saved_dtype()
    if told is None:
        return []
    given = {field.name: getattr(told, field.name) for field in dataclasses.fields(told)}
    if told.dtype is None and isinstance(saved, torch.dtype):
        given["dtype"] = str(saved).removeprefix("torch.")
    return [QuantizeAwareCallback(**given)]


def _finished(model: PreTrainedModel, job: Job, summary: str, aware: Sequence[QuantizeAwareCallback]) -> Outcome:
    """Return what a training leaves: the model as it was trained, or packed if it was trained for few bits."""
    if not aware:
        return Outcome(_in_saved_dtype(model, job), summary)
    report = aware[0].export(model)
    return Outcome(model, f"{summary}, trained for {aware[0].method.summary}", report.to_dict())


def _trained(trainer: Trainer, pruning: Sequence[GradualPruneCallback]) -> str:
    assert isinstance(trainer.model, nn.Module)
    shares = [f"{one.reached(trainer.model):.1%} of the targeted {one.what} pruned" for one in pruning]
    return ", ".join([f"{trainer.state.global_step} steps", *shares])


def _in_saved_dtype(model: PreTrainedModel, job: Job) -> PreTrainedModel:
    """Training runs in float32; between stages a model has the dtype of the checkpoint that the recipe began with.

    Buffers that are not saved (rotary frequencies) stay in float32, as they are after a reload.
    """
    dtype = job.saved_dtype()
    if isinstance(dtype, torch.dtype):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model
