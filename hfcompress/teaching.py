"""A recipe's teachers: what is refused before the first stage, and their answers written to disk ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hfcompress import opening
from hfcompress.distillation.checks import check_logit_losses, logit_losses_of
from hfcompress.distillation.crossing import crossing_loss, refuse_tokenizers
from hfcompress.distillation.losses import FeatureLoss, named
from hfcompress.distillation.matching import check_layers
from hfcompress.distillation.pairs import (
    refuse_other_labels,
    refuse_other_preparation,
    refuse_other_size,
    refuse_other_vocabulary,
    shared_vocabulary,
    tokenizer_of,
)
from hfcompress.distillation.teachers import (
    CachedTeacher,
    CacheReport,
    cache_teacher,
    is_cache,
    refuse_k,
    refuse_other_files,
)
from hfcompress.errors import DataError, ModelError
from hfcompress.job import Source
from hfcompress.outputs import label_names, outputs_of
from hfcompress.recipe import Distill, ModelSpec, Recipe, Stage
from hfcompress.structure import DropLayers, find_stack
from hfcompress.structure.layers import kept_count
from hfcompress.structure.lengths import longest_input
from hfcompress.tasks.lengths import refuse_longer

ORIGINAL = "original"


def check_teachers(source: Source, stage: Stage) -> None:
    """Raise ModelError or DataError for teachers and losses of a distill stage that cannot go together.

    Teachers that are earlier stages of the recipe are its own model, which fits.
    """
    options = stage.options
    assert isinstance(options, Distill)
    stages = [stage.name for stage in source.recipe.stages]
    losses = named(options.losses or ())
    crossing = crossing_loss(losses)
    inside = [name for name, loss in losses.items() if isinstance(loss, FeatureLoss)]
    if ORIGINAL in options.teachers and source.head_is_new and (not losses or len(inside) < len(losses)):
        raise _no_head(source, f"Name the stage that trains one: teacher: {stages[0]}.")
    caches = [
        CachedTeacher(Path(name).expanduser()) for name in options.teachers if crossing is None and is_cache(name)
    ]
    for cache in caches:
        _check_cache(source, cache, options)
    for name in options.teachers:
        if crossing is not None:
            _check_other_tokenizer(source, crossing, None if name in (ORIGINAL, *stages) else name)
        elif is_cache(name):
            continue
        elif name not in (ORIGINAL, *stages):
            _check_model(source, ModelSpec(id=name))
    if inside and (len(options.teachers) > 1 or is_cache(options.teachers[0])):
        raise ModelError(f"{inside[0]} looks inside the teacher: it needs one teacher, which is a model.")
    classes = _classes(source)
    for name, loss in losses.items():
        k = getattr(loss, "k", None)
        if k is not None and classes is not None and k > classes:
            raise ModelError(f"{name}: k={k} is more than the {classes} classes there are.")
    _check_logit_losses(source, options, caches)
    if inside:
        _check_layers(source, stages.index(stage.name), options)


def _check_logit_losses(source: Source, options: Distill, caches: list[CachedTeacher]) -> None:
    """Check the losses as the stage's Trainer will, by a student without weights."""
    student = opening.skeleton(source.task, source.config, source.head)
    if student is None:
        return
    source.task.prepare_(student, source.processor, source.head)
    kind = source.task.outputs(source.recipe.data) or outputs_of(student)
    losses = logit_losses_of(options.losses, options.temperature, kind, caches)
    check_logit_losses(student, kind, losses, caches)


def _check_layers(source: Source, position: int, options: Distill) -> None:
    """Check the layers that losses of features name as the stage's Trainer will, by models without weights."""
    names, teacher = [stage.name for stage in source.recipe.stages], options.teachers[0]
    student, other = _after(source, position), _after(source, 0)
    if teacher in names:
        other = _after(source, names.index(teacher) + 1)
    elif teacher != ORIGINAL:
        other = opening.skeleton(source.task, opening.open_config(ModelSpec(id=teacher)), None)
    if student is not None and other is not None:
        losses = named(options.losses or ())
        check_layers({name: one for name, one in losses.items() if isinstance(one, FeatureLoss)}, student, other)


def _after(source: Source, stages: int) -> PreTrainedModel | None:
    """Return the recipe's model, without weights, with as many layers as it has after its first ``stages`` stages.

    None for classes that are not in Transformers.
    """
    model = opening.skeleton(source.task, source.config, source.head)
    if model is None:
        return None
    for stage in source.recipe.stages[:stages]:
        if isinstance(stage.options, DropLayers):
            stack = find_stack(model, stage.options.stack)
            model.set_submodule(stack.name, stack.layers[: kept_count(len(stack), stage.options)])
    return model


def _no_head(source: Source, advice: str) -> ModelError:
    """Return the error of the recipe's model as a teacher whose answers would be random."""
    return ModelError(
        f"Model '{source.recipe.model.id}' has no trained head for {source.task.name}, so it has nothing to teach. "
        f"{advice}"
    )


def _check_model(source: Source, teacher: ModelSpec) -> None:
    """A model from outside reads the student's inputs, and its outputs must mean the student's."""
    task, config, student = source.task, opening.open_config(teacher), source.config
    if task.head_name is None:
        opening.refuse_other_class(teacher, config, task)
    if (row := task.row_length(source.recipe.data)) is not None:
        refuse_longer(teacher.id, longest_input(config), *row)
    processors = source.processor, opening.open_processor(teacher, task)
    refuse_other_preparation(teacher.id, *processors)
    own, other = (tokenizer_of(one) for one in processors)
    if task.predicts_tokens and own is not None:
        sizes = [int(one.get_text_config().vocab_size or 0) for one in (student, config)]
        shared_vocabulary(sizes[0], sizes[1], own, other)
    elif own is not None and other is not None:
        refuse_other_vocabulary(own.get_vocab(), other.get_vocab())
    if task.head_name is None:
        if not task.predicts_tokens:
            widths = [int(one.get_text_config().hidden_size) for one in (student, config)]
            refuse_other_size(widths[0], widths[1], "vectors")
        return
    if not opening.has_trained_head(config, task):
        raise ModelError(f"Teacher '{teacher.id}' has no trained head for {task.name}, so it has nothing to teach.")
    if source.labels:
        refuse_other_size(len(source.labels), len(label_names(config)))
        trained = opening.has_trained_head(student, task)
        refuse_other_labels(label_names(student) if trained else source.labels, label_names(config))


def _check_other_tokenizer(source: Source, loss: str, teacher: str | None) -> None:
    """A teacher that reads texts is a causal language model with a fast tokenizer.  teacher: None for our own."""
    if source.task.name != "causal-lm":
        raise ModelError(
            f"{loss} compares what two causal language models expect next; the task is {source.task.name}."
        )
    if teacher is not None and is_cache(teacher):
        raise ModelError(
            f"{loss} asks the teacher about a text, but {teacher} holds answers to the student's tokens. Name a model."
        )
    spec = None if teacher is None else ModelSpec(id=teacher)
    other = source.processor if spec is None else opening.open_processor(spec, source.task)
    refuse_tokenizers(loss, tokenizer_of(source.processor), tokenizer_of(other))


def _check_cache(source: Source, cache: CachedTeacher, options: Distill) -> None:
    """A cache must hold the answers to these rows that these losses need."""
    index = cache.index
    if source.labels:
        refuse_other_size(len(source.labels), len(index.labels))
    own, size = tokenizer_of(source.processor), _classes(source)
    if source.task.predicts_tokens and own is not None and size is not None and index.classes is not None:
        shared_vocabulary(size, index.classes, own, own)  # that the rows' tokens are the teacher's is seen below
    for name, loss in named(options.losses or ()).items():
        if index.k is not None and not getattr(loss, "takes_top_k", False) and not isinstance(loss, FeatureLoss):
            raise ModelError(
                f"{cache.folder} holds the {index.k} most probable classes only; {name} needs all. Use top_k_kl."
            )
    cache.refuse_other_rows(source.encoded("train"), source.task.collator(source.processor, source.recipe.data))


def _classes(source: Source) -> int | None:
    """Return how many classes a place has, None where the recipe does not say."""
    if source.labels:
        return len(source.labels)
    return int(source.config.get_text_config().vocab_size or 0) if source.task.predicts_tokens else None


def cache_recipe_teacher(
    recipe: Recipe, folder: Path, *, teacher: str, k: int | None, temperature: float, batch_size: int
) -> CacheReport:
    """Write a teacher's answers to a recipe's training rows, for ``teacher: <folder>`` in its distill stage.

    teacher: ``original`` for the recipe's model, or any model id or checkpoint folder.
    Everything that can be known from configs and data is checked before the teacher is opened.
    """
    refuse_other_files(folder)
    source = Source(recipe)
    if source.task.draws_anew:
        raise DataError(
            f"{source.task.name} hides other tokens in every epoch, so no training would find answers that were "
            "written ahead. Give the distill stage the teacher as a model."
        )
    spec = _spec_of(source, teacher)
    refuse_k(k, _classes(source))
    rows: Any = source.encoded("train")
    model = source.open_in(spec, "fast")
    collator = source.task.collator(source.processor, source.recipe.data)
    return cache_teacher(
        model, rows, folder, collator=collator, k=k, temperature=temperature, batch_size=batch_size, name=spec.id,
        outputs=source.task.outputs(source.recipe.data),
    )  # fmt: skip


def _spec_of(source: Source, teacher: str) -> ModelSpec:
    stages = [stage.name for stage in source.recipe.stages]
    if teacher == ORIGINAL:
        if source.head_is_new:
            raise _no_head(source, "Name a fine-tuned one as teacher.")
        return source.recipe.model
    if teacher in stages:
        raise DataError(
            f"Teacher '{teacher}' is a stage of the recipe, whose model is there only while it runs. Name the folder "
            "of a finished model."
        )
    spec = ModelSpec(id=teacher)
    _check_model(source, spec)
    return spec
