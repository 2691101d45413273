"""What is refused before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hfcompress.distillation.answers import Labelled, Unanswered, answers_of
from hfcompress.distillation.config import DEFAULT_TEMPERATURE, DistillationConfig
from hfcompress.distillation.losses import FeatureLoss, LogitLoss, named
from hfcompress.distillation.losses.binary_kl import BinaryKL
from hfcompress.distillation.losses.forward_kl import ForwardKL
from hfcompress.distillation.losses.logit_mse import LogitMSE
from hfcompress.distillation.losses.top_k_kl import TopKKL
from hfcompress.distillation.pairs import (
    label_names,
    problem_of,
    refuse_other_labels,
    refuse_other_size,
    shared_vocabulary,
)
from hfcompress.distillation.teachers import CachedTeacher, LiveTeacher, Teacher
from hfcompress.errors import ModelError

WeightedTeachers = list[tuple[Teacher, float]]


def check_run(args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise ModelError for arguments with which nothing can be distilled."""
    if not isinstance(args, DistillationConfig):
        raise ModelError(f"DistillationTrainer takes a DistillationConfig as args, not a {type(args).__name__}.")
    if args.use_liger_kernel:
        raise ModelError("use_liger_kernel leaves no logits to distil from; turn it off for distillation.")
    if not any(isinstance(loss, FeatureLoss) for loss in args.chosen):
        return
    if args.torch_compile:
        raise ModelError(
            "torch_compile does not run the hooks that losses of features read a model by. Turn it off, or distil "
            "logits alone."
        )
    if args.fsdp or args.deepspeed:
        raise ModelError("Losses of features work in one process or with DDP, not with FSDP or DeepSpeed.")
    how: Any = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and how.get("use_reentrant", False):
        raise ModelError(
            "Reentrant gradient checkpointing cuts what layers compute off the gradient: set "
            "gradient_checkpointing_kwargs={'use_reentrant': False} for losses of features."
        )


def teachers_of(given: Any, weights: Sequence[float] | None) -> WeightedTeachers:
    """Return the teachers with their shares, which sum to 1.  Raises ModelError for anything else than a teacher."""
    models = list(given) if isinstance(given, (list, tuple)) else [given]
    if not models:
        raise ModelError("teacher_model is an empty list; give one teacher or more.")
    shares = [1.0] * len(models) if weights is None else list(weights)
    if len(shares) != len(models):
        raise ModelError(f"There are {len(models)} teachers, but {len(shares)} teacher_weights.")
    if not all(0 <= share < math.inf for share in shares) or sum(shares) <= 0:
        raise ModelError(f"teacher_weights={shares} must be 0 or more, and not all 0.")
    return [(_teacher(model), share / sum(shares)) for model, share in zip(models, shares)]


def _teacher(given: Any) -> Teacher:
    if isinstance(given, Teacher):
        return given
    if isinstance(given, PreTrainedModel):
        return LiveTeacher(given)
    if isinstance(given, (str, Path)):
        return CachedTeacher(given)
    raise ModelError(
        f"teacher_model must be a transformers PreTrainedModel, not a {type(given).__name__}; or a folder that "
        "cache_teacher wrote."
    )


def logit_losses_of(
    args: DistillationConfig, student: PreTrainedModel, teachers: WeightedTeachers
) -> dict[str, LogitLoss]:
    """Return the losses of logits by name: those of the arguments, or the one that fits student and teachers."""
    if args.losses is not None:
        return {name: loss for name, loss in named(args.chosen).items() if isinstance(loss, LogitLoss)}
    if any(teacher.top_k for teacher, _ in teachers):
        index = next(one.index for one, _ in teachers if isinstance(one, CachedTeacher) and one.top_k)
        return named([TopKKL(k=index.k or 1, temperature=args.temperature or index.temperature)])  # type: ignore[return-value]
    temperature = args.temperature or DEFAULT_TEMPERATURE
    default: dict[str | None, LogitLoss] = {
        "regression": LogitMSE(),
        "multi_label_classification": BinaryKL(temperature=temperature),
    }
    return named([default.get(problem_of(student), ForwardKL(temperature=temperature))])  # type: ignore[return-value]


def check_pair(
    student: Any, teachers: WeightedTeachers, args: DistillationConfig, tokenizer: Any, teacher_tokenizer: Any
) -> int | None:
    """Refuse models whose outputs do not mean the same; return how many classes they share, None for all."""
    if not isinstance(student, PreTrainedModel):
        raise ModelError(f"model must be a transformers PreTrainedModel, not a {type(student).__name__}.")
    _check_losses(student, teachers, args)
    if isinstance(answers_of(student), Unanswered):
        return None
    shared = [_shared_classes(student, teacher, tokenizer, teacher_tokenizer) for teacher, _ in teachers]
    known = [one for one in shared if one is not None]
    return min(known) if known else None


def _check_losses(student: PreTrainedModel, teachers: WeightedTeachers, args: DistillationConfig) -> None:
    losses = logit_losses_of(args, student, teachers)
    name, problem = type(student).__name__, problem_of(student)
    if isinstance(answers_of(student), Unanswered) and (losses or args.alpha < 1):
        raise ModelError(
            f"{name} has no logits and no task loss. Give losses of features, such as sentence_embedding, and alpha=1."
        )
    for one, loss in losses.items():
        if problem in ("regression", "multi_label_classification") and loss.of_distributions:
            raise ModelError(
                f"model is a {problem} model; {one} compares distributions over classes, which it has not. Use "
                f"{'logit_mse' if problem == 'regression' else 'binary_kl or logit_mse'}."
            )
        classes = answers_of(student).classes(student)
        if classes is not None and getattr(loss, "k", 1) > classes:
            raise ModelError(f"{one}: k={loss.k} is more than the {classes} classes there are.")  # type: ignore[attr-defined]
    for teacher, _ in teachers:
        if isinstance(teacher, CachedTeacher):
            _check_cache(student, teacher, losses)
    features = [one for one, loss in named(args.chosen).items() if isinstance(loss, FeatureLoss)]
    if features and (len(teachers) > 1 or not isinstance(teachers[0][0], LiveTeacher)):
        raise ModelError(f"{features[0]} looks inside the teacher: it needs one teacher, which is a model.")


def _check_cache(student: PreTrainedModel, cache: CachedTeacher, losses: Mapping[str, LogitLoss]) -> None:
    """Refuse a cache that cannot answer what is asked."""
    index, folder = cache.index, cache.folder
    if index.answers != type(answers_of(student)).__name__:
        raise ModelError(
            f"{folder} holds answers of a {index.name}, which a {type(student).__name__} is not asked for."
        )
    if index.labels and student.get_output_embeddings() is None and index.classes is not None:
        refuse_other_size(len(label_names(student.config)), index.classes)
        refuse_other_labels(label_names(student.config), index.labels)
    for name, loss in losses.items() if index.k is not None else ():
        if not loss.takes_top_k:
            raise ModelError(
                f"{folder} holds the {index.k} most probable classes only; {name} needs all. Use top_k_kl."
            )
        if getattr(loss, "temperature", 1.0) != index.temperature:
            raise ModelError(
                f"{folder} was written at temperature {index.temperature:g}, but {name} has "
                f"{getattr(loss, 'temperature', 1.0):g}. Give the loss the same, or write another cache."
            )


def _shared_classes(student: PreTrainedModel, teacher: Teacher, tokenizer: Any, teacher_tokenizer: Any) -> int | None:
    own = answers_of(student).classes(student)
    if isinstance(teacher, LiveTeacher):
        _refuse_other_kind(student, teacher.model)
    if own is None or teacher.classes is None:
        return None
    if student.get_output_embeddings() is not None:
        return shared_vocabulary(own, teacher.classes, tokenizer, teacher_tokenizer)
    refuse_other_size(own, teacher.classes)
    if isinstance(teacher, LiveTeacher):
        refuse_other_labels(label_names(student.config), label_names(teacher.model.config))
    return own


def _refuse_other_kind(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher that answers another kind of question, or none."""
    own, other = answers_of(student), answers_of(teacher)
    same = type(own) is type(other) and getattr(own, "shifted", None) == getattr(other, "shifted", None)
    heads = [model.get_output_embeddings() is not None for model in (student, teacher)]
    if not same or (isinstance(own, Labelled) and heads[0] != heads[1]):
        raise ModelError(
            f"teacher_model is a {type(teacher).__name__} and cannot answer what a {type(student).__name__} is asked: "
            "open it with the student's Auto class."
        )
    problems = [problem_of(model) for model in (student, teacher)]
    if problems[0] != problems[1]:
        said = [problem or "single_label_classification" for problem in problems]
        raise ModelError(
            f"model is a {said[0]} model and teacher_model a {said[1]} model; their logits differ in kind."
        )
