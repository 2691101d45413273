"""Everything about a recipe that can be found out before its first stage."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from transformers import IntervalStrategy, TrainingArguments

from hfcompress.checkpoint.verify import require_loader
from hfcompress.distillation import DistillationConfig
from hfcompress.distillation.checks import check_run
from hfcompress.distillation.teachers import is_cache
from hfcompress.errors import HFCompressError, ModelError, RecipeError
from hfcompress.evaluate import load_metric, refuse_unreadable
from hfcompress.job import Source
from hfcompress.recipe import Distill, Finetune, Prune, PruneVocabulary, Quantize, Stage
from hfcompress.recipe.options import StageOptions
from hfcompress.structure import DropLayers
from hfcompress.structure.layers import kept_count
from hfcompress.structure.lengths import longest_input
from hfcompress.tasks.lengths import refuse_longer
from hfcompress.teaching import check_teachers
from hfcompress.training import training_options, try_arguments
from hfcompress.vocabulary import refuse_unprunable


def check_before_work(source: Source) -> None:
    """Open everything a recipe names, so that a fault shows before the first stage and not hours into it."""
    recipe = source.recipe
    _ = source.config  # a model that is not there is said before any data are opened
    source.task.check(source.config, source.processor, recipe.data)
    _ = source.head
    if source.head_is_new and recipe.stages[0].kind != "finetune":
        raise ModelError(
            f"Model '{recipe.model.id}' has no trained head for {recipe.task}. Begin the recipe with a finetune stage."
        )
    refuse_unreadable(source.metrics, source.task.forms(source.head))
    for name in source.metrics:
        load_metric(name)
    if source.task.pads:
        _check_padding(source)
    _check_lengths(source)
    for stage in recipe.stages:
        _check_stage(source, stage)
    for part in ("train", "held_out"):
        source.encoded(part)


def _check_stage(source: Source, stage: Stage) -> None:
    options = stage.options
    if isinstance(options, DropLayers) and options.stack is None:
        kept_count(_layers_before(source, stage), options)
    if isinstance(options, (Finetune, Distill)):
        _check_training(source, stage, options)
    if isinstance(options, Distill):
        check_teachers(source, stage)
        _check_on_policy(source, stage, options)
    if isinstance(options, PruneVocabulary):
        refuse_unprunable(source.processor, options.keep)
    package = _package_of(options)
    if package is not None:
        require_loader(package)
    if isinstance(options, (Prune, Quantize)) and options.method.needs_calibration:
        source.calibration_rows(options)


def _check_training(source: Source, stage: Stage, options: Finetune | Distill) -> None:
    """Refuse TrainingArguments that do not go together, or with which this stage's Trainer or task cannot work."""
    here = f"The training options of stage '{stage.name}'"
    aims: dict[str, Any] = {}
    if isinstance(options, Distill):
        aims = {"losses": options.losses, "on_policy": options.on_policy}
    with TemporaryDirectory() as scratch:
        told = training_options(options, Path(scratch), source.recipe.seed)
        try:
            arguments = DistillationConfig(**told, **aims)
            if isinstance(options, Distill):
                check_run(arguments, {})
            try_arguments(arguments)
        except (ValueError, TypeError, RuntimeError, ImportError, HFCompressError) as error:
            raise RecipeError(f"{here} do not go together: {error}") from error
    _refuse_for_task(arguments, source, here)


def _refuse_for_task(arguments: TrainingArguments, source: Source, here: str) -> None:
    """Raise RecipeError for arguments that the recipe's task or model has no use for.  here: begins the message."""
    task, forms = source.task, source.task.forms(source.head)
    if arguments.label_smoothing_factor and "classes" not in forms:
        raise RecipeError(
            f"{here} cannot be used: label_smoothing_factor needs a loss of classes, but the answers of {task.name} "
            f"are {', '.join(forms)}. Take it out."
        )
    best, evaluates = arguments.metric_for_best_model, arguments.eval_strategy != IntervalStrategy.NO
    measured = () if "vectors" in forms else ("loss", "eval_loss")
    if best is not None and evaluates and best not in measured:
        has = "the task loss alone: use metric_for_best_model: loss" if measured else "no loss, as there are no labels"
        raise RecipeError(f"{here} cannot be used: there is no '{best}' to choose by; a stage evaluates {has}.")
    if arguments.train_sampling_strategy == "group_by_length" and task.row_length(source.recipe.data) is None:
        raise RecipeError(f"{here} cannot be used: train_sampling_strategy: the rows of {task.name} have no tokens.")
    known = getattr(transformers, task.auto_class)._model_mapping
    kind: Any = known.get(type(source.config), None)  # None for code of its own
    if arguments.activation_checkpointing and kind is not None and not kind.supports_gradient_checkpointing:
        raise RecipeError(
            f"{here} cannot be used: activation_checkpointing is not for a {kind.__name__}. Take it out."
        )


def _package_of(options: StageOptions) -> str | None:
    """Return the package that stock Transformers reads the stage's checkpoint with, None where it needs none."""
    aware = options.quantize_aware if isinstance(options, (Finetune, Distill)) else None
    method = options.method if isinstance(options, Quantize) else aware
    return None if method is None else method.package


def _check_on_policy(source: Source, stage: Stage, options: Distill) -> None:
    """Only a language model writes, a cache knows no new texts, and the texts must not be longer than the model."""
    if options.on_policy is None:
        return
    here = f"{stage.name}.on_policy"
    if source.task.name != "causal-lm":
        raise RecipeError(f"{here} lets a causal language model write; this recipe's task is {source.task.name}.")
    caches = [name for name in options.teachers if is_cache(name)]
    if caches:
        raise RecipeError(f"{here} asks the teacher about new texts, but '{caches[0]}' holds answers to older ones.")
    length = (options.on_policy.prompt_tokens or 0) + options.on_policy.max_new_tokens
    option = f"{here}.prompt_tokens with max_new_tokens"
    refuse_longer(source.recipe.model.id, longest_input(source.config), option, length)


def _check_padding(source: Source) -> None:
    """A classifier's rows are padded to the longest of their batch, so there must be a token to do it with."""
    model, padding = source.recipe.model, source.processor.pad_token_id
    size = source.config.get_text_config().vocab_size
    if padding is None:
        raise ModelError(
            f"The tokenizer of '{model.id}' has no padding token and no end token, so its rows cannot be put into "
            "batches. Set its pad_token and save it again."
        )
    if padding >= size:
        raise ModelError(
            f"The tokenizer of '{model.id}' pads with token {padding}, but the model knows only {size} tokens. "
            "Set its pad_token to one of them and save it again."
        )


def _check_lengths(source: Source) -> None:
    recipe, model = source.recipe, source.recipe.model
    limit = longest_input(source.config)
    if (row := source.task.row_length(recipe.data)) is not None:
        refuse_longer(model.id, limit, *row)
    if recipe.evaluate.prompt:
        length = len(source.processor(recipe.evaluate.prompt)["input_ids"]) + recipe.evaluate.new_tokens
        refuse_longer(model.id, limit, "evaluate.prompt with evaluate.new_tokens", length)
    for index, stage in enumerate(recipe.stages):
        options = stage.options
        # Rows that are not packed are cut to data.max_length for calibration too.
        if not isinstance(options, (Prune, Quantize)) or not options.method.needs_calibration:
            continue
        if source.task.packs and recipe.data.max_length is None:
            option = f"stages[{index}].{stage.kind}.calibration_length"
            refuse_longer(model.id, limit, option, options.calibration_length)


def _layers_before(source: Source, stage: Stage) -> int:
    """Return how many layers the stack has when this stage begins."""
    layers = int(source.config.get_text_config().num_hidden_layers)
    for earlier in source.recipe.stages:
        if earlier is stage:
            break
        if isinstance(earlier.options, DropLayers) and earlier.options.stack is None:
            layers = kept_count(layers, earlier.options)
    return layers
