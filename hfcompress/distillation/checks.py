"""What is refused before the first step."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hfcompress.distillation.config import DEFAULT_TEMPERATURE, DistillationConfig
from hfcompress.distillation.losses import FeatureLoss, LogitLoss, Loss, named
from hfcompress.distillation.losses.forward_kl import ForwardKL
from hfcompress.distillation.losses.logit_cosine import LogitCosine
from hfcompress.distillation.losses.logit_mse import LogitMSE
from hfcompress.distillation.losses.taps import is_compiled
from hfcompress.distillation.losses.top_k_kl import TopKKL
from hfcompress.distillation.pairs import (
    refuse_other_labels,
    refuse_other_size,
    refuse_other_vocabulary,
    shared_vocabulary,
)
from hfcompress.distillation.teachers import AcrossTokenizers, CachedTeacher, LiveTeacher, Teacher
from hfcompress.errors import ModelError
from hfcompress.outputs import Binary, Classes, Frames, NextTokens, Outputs, Vectors, outputs_of

WeightedTeachers = list[tuple[Teacher, float]]


def check_run(args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise ModelError for arguments with which nothing can be distilled."""
    if not isinstance(args, DistillationConfig):
        raise ModelError(f"DistillationTrainer takes a DistillationConfig as args, not a {type(args).__name__}.")
    if args.use_liger_kernel:
        raise ModelError("use_liger_kernel leaves no logits to distil from; turn it off for distillation.")
    if args.n_gpu > 1:
        raise ModelError(
            f"One process would run {args.n_gpu} copies of the student, whose outputs cannot be told apart. Start one "
            "process per device with torchrun, or show one device by CUDA_VISIBLE_DEVICES."
        )
    check_sharding(args, bool(args.fsdp or args.deepspeed))
    if not any(isinstance(loss, FeatureLoss) for loss in args.chosen):
        return
    if args.torch_compile:
        raise ModelError(
            "torch_compile does not run the hooks that losses of features read a model by. Turn it off, or distil "
            "logits alone."
        )
    how: Any = args.gradient_checkpointing_kwargs or {}
    # What is handed on without saying it gets PyTorch's own default, which is reentrant.
    handed_on = set(how) - {"every_n_layers", "offload"}
    if args.gradient_checkpointing and how.get("use_reentrant", bool(handed_on)):
        raise ModelError(
            "Reentrant checkpointing cuts what layers compute off the gradient: set 'use_reentrant': False in "
            "activation_checkpointing_kwargs for losses of features."
        )


def check_sharding(args: DistillationConfig, sharded: bool) -> None:
    """Raise ModelError for what reads or runs the student from outside where its weights lie in shards.

    sharded: by FSDP or DeepSpeed, of the arguments or of ``accelerate launch``, of which only the Trainer knows.
    """
    if sharded and args.on_policy is not None:
        raise ModelError("on_policy lets the student write in one process or with DDP, not with FSDP or DeepSpeed.")
    if sharded and any(isinstance(loss, FeatureLoss) for loss in args.chosen):
        raise ModelError("Losses of features work in one process or with DDP, not with FSDP or DeepSpeed.")


def teachers_of(given: Any, weights: Sequence[float] | None, student: Any) -> WeightedTeachers:
    """Return the teachers with their shares, which sum to 1.

    Raises ModelError for anything else than a teacher, before it changes any, and for the student itself.
    """
    models = list(given) if isinstance(given, (list, tuple)) else [given]
    if not models:
        raise ModelError("teacher_model is an empty list; give one teacher or more.")
    if any(one is student for one in models):
        raise ModelError("The student is its own teacher. Give a copy of it (copy.deepcopy) or another model.")
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
    chosen: Sequence[Loss] | None, temperature: float | None, kind: Outputs, teachers: Sequence[Teacher]
) -> dict[str, LogitLoss]:
    """Return the losses of logits by name: those that were chosen, or what fits the kind and the teachers."""
    if chosen is not None:
        return {name: loss for name, loss in named(chosen).items() if isinstance(loss, LogitLoss)}
    if any(teacher.top_k for teacher in teachers):
        index = next(one.index for one in teachers if isinstance(one, CachedTeacher) and one.top_k)
        return named([TopKKL(k=index.k or 1, temperature=temperature or index.temperature)])  # type: ignore[return-value]
    default: dict[str, list[LogitLoss]] = {
        "odds": [ForwardKL(temperature=temperature or DEFAULT_TEMPERATURE)],
        "numbers": [LogitMSE()],
        "vectors": [LogitCosine(), LogitMSE()],
    }
    return named(default[kind.values])  # type: ignore[return-value]


def losses_of(args: DistillationConfig, kind: Outputs, teachers: WeightedTeachers) -> dict[str, LogitLoss]:
    """Return the losses of logits of a run by name."""
    chosen = None if args.losses is None else args.chosen
    return logit_losses_of(chosen, args.temperature, kind, [teacher for teacher, _ in teachers])


def check_pair(
    student: Any,
    kind: Outputs,
    teachers: WeightedTeachers,
    args: DistillationConfig,
    tokenizer: Any,
    teacher_tokenizer: Any,
) -> int | None:
    """Refuse models whose outputs do not mean the same; return how many classes they share, None for all.

    kind: of the student's outputs.
    """
    if hasattr(student, "get_base_model"):
        raise ModelError(
            f"A {type(student).__name__} has adapters, which cannot be distilled into. Merge them (merge_and_unload) "
            "and give the model that this returns."
        )
    if not isinstance(student, PreTrainedModel):
        raise ModelError(
            f"model must be a transformers PreTrainedModel, not a {type(student).__name__}. To compile one, give it "
            "as it is and set torch_compile=True."
        )
    _refuse_other_tokens(teachers, tokenizer, teacher_tokenizer)
    losses = losses_of(args, kind, teachers)
    if losses:
        _refuse_without_logits(student, kind)
    check_logit_losses(student, kind, losses, [teacher for teacher, _ in teachers])
    _check_feature_losses(student, teachers, args)
    if args.on_policy is not None:
        _check_on_policy(student, kind, teachers)
    if kind.values == "vectors" and not losses:
        return None  # losses of features project one width on the other
    shared = [_shared_classes(student, kind, teacher, tokenizer, teacher_tokenizer) for teacher, _ in teachers]
    known = [one for one in shared if one is not None]
    return min(known) if known else None


def _refuse_other_tokens(teachers: WeightedTeachers, *tokenizers: Any) -> None:
    """Refuse teachers to whom the student's input ids are other words, unless they read texts in their own."""
    own, other = (getattr(one, "get_vocab", None) for one in tokenizers)
    if own is None or other is None or any(isinstance(teacher, AcrossTokenizers) for teacher, _ in teachers):
        return
    refuse_other_vocabulary(own(), other())


def _refuse_without_logits(student: PreTrainedModel, kind: Outputs) -> None:
    """Refuse a class that says of its output that it holds no ``logits``, such as one of two heads."""
    hint = inspect.signature(student.forward).return_annotation
    said: list[Any] = [
        one for one in (*get_args(hint), hint) if isinstance(one, type) and issubclass(one, ModelOutput)
    ]
    fields = {field.name for one in said if dataclasses.is_dataclass(one) for field in dataclasses.fields(one)}
    if isinstance(kind, Classes) and fields and "logits" not in fields:
        raise ModelError(
            f"A {type(student).__name__} gives {', '.join(sorted(fields))} but no logits to distil. Open it with its "
            "task's Auto class."
        )


def check_logit_losses(
    student: PreTrainedModel, kind: Outputs, losses: Mapping[str, LogitLoss], teachers: Sequence[Teacher]
) -> None:
    """Raise ModelError for losses that do not fit the student's outputs, or what caches hold.

    student: its weights are not looked at.
    """
    for one, loss in losses.items():
        classes = kind.size(student)
        flat = isinstance(kind, Binary) or classes == 1
        if kind.values != "odds" and loss.of_distributions:
            raise ModelError(
                f"The student gives {kind.what}; {one} compares distributions over classes, which it has not. Use "
                f"logit_mse{'' if flat else ' or logit_cosine'}."
            )
        if flat and isinstance(loss, LogitCosine):
            raise ModelError(
                f"The student gives {kind.what}: the direction of a single number is its sign, which has no gradient, "
                f"so {one} would teach nothing. Use logit_mse{'' if kind.values == 'numbers' else ' or forward_kl'}."
            )
        if kind.ragged and not loss.of_distributions:
            raise ModelError(
                f"The student gives {kind.what}, among as many places as the batch is long, so {one} would depend on "
                "the padding. Use a loss of distributions, such as forward_kl."
            )
        if classes is not None and getattr(loss, "k", 1) > classes:
            raise ModelError(f"{one}: k={loss.k} is more than the {classes} classes there are.")  # type: ignore[attr-defined]
    for teacher in teachers:
        if isinstance(teacher, CachedTeacher):
            _check_cache(student, kind, teacher, losses)


def _check_feature_losses(student: PreTrainedModel, teachers: WeightedTeachers, args: DistillationConfig) -> None:
    features = [one for one, loss in named(args.chosen).items() if isinstance(loss, FeatureLoss)]
    if features and (len(teachers) > 1 or not isinstance(teachers[0][0], LiveTeacher)):
        raise ModelError(f"{features[0]} looks inside the teacher: it needs one teacher, which is a model.")
    for who, model in (("student", student), ("teacher", getattr(teachers[0][0], "model", None))):
        if features and model is not None and is_compiled(model):
            raise ModelError(
                f"The {who} was compiled in place (compile), which does not run the hooks that {features[0]} reads it "
                "by. Give it as it was, or distil logits alone."
            )


def _check_on_policy(student: PreTrainedModel, kind: Outputs, teachers: WeightedTeachers) -> None:
    """Refuse a student that writes no texts, and teachers that cannot answer new ones."""
    if not isinstance(kind, NextTokens):
        raise ModelError(
            f"on_policy lets a causal language model write; a {type(student).__name__} gives {kind.what}."
        )
    for teacher, _ in teachers:
        if isinstance(teacher, CachedTeacher):
            raise ModelError(
                f"on_policy asks the teacher about texts that the student writes during the training, but "
                f"{teacher.folder} holds answers to texts that were there before. Give the teacher as a model."
            )


def _check_cache(
    student: PreTrainedModel, kind: Outputs, cache: CachedTeacher, losses: Mapping[str, LogitLoss]
) -> None:
    """Refuse a cache that cannot answer what is asked."""
    index, folder, names = cache.index, cache.folder, kind.class_names(student)
    if index.outputs != type(kind).__name__ or bool(names) != bool(index.labels):
        raise ModelError(
            f"{folder} holds answers of a {index.name}, which a {type(student).__name__} is not asked for."
        )
    if isinstance(kind, Vectors) and kind.pooling != index.pooling:
        raise ModelError(
            f"{folder} holds vectors pooled by '{index.pooling}', but the student's are by '{kind.pooling}'. Write a "
            "cache of such vectors."
        )
    if names:
        refuse_other_size(len(names), len(index.labels))
        refuse_other_labels(names, index.labels)
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


def _shared_classes(
    student: PreTrainedModel, kind: Outputs, teacher: Teacher, tokenizer: Any, teacher_tokenizer: Any
) -> int | None:
    own = kind.size(student)
    if isinstance(teacher, LiveTeacher):
        _refuse_other_kind(student, kind, teacher.model)
    if own is None or teacher.classes is None:
        return None
    if student.get_output_embeddings() is not None or isinstance(kind, Frames):
        return shared_vocabulary(own, teacher.classes, tokenizer, teacher_tokenizer)
    refuse_other_size(own, teacher.classes, kind.values)
    return own


def _refuse_other_kind(student: PreTrainedModel, kind: Outputs, teacher: PreTrainedModel) -> None:
    """Refuse a teacher that answers another kind of question, or none, or with other classes."""
    other = outputs_of(teacher)
    names = kind.class_names(student), other.class_names(teacher)
    if type(kind) is not type(other) or (names[0] is None) != (names[1] is None):
        raise ModelError(
            f"teacher_model is a {type(teacher).__name__} and cannot answer what a {type(student).__name__} is asked: "
            f"the one gives {other.what}, the other {kind.what}. Open it with the student's Auto class; of "
            "classifiers, config.problem_type says which kind they are."
        )
    if names[0] is not None and names[1] is not None:
        refuse_other_size(len(names[0]), len(names[1]))
        refuse_other_labels(names[0], names[1])
