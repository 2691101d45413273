"""Everything about a recipe that can be found out before its first stage."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hfcompress import opening
from hfcompress.distillation import DistillationConfig
from hfcompress.errors import DataError, MissingDependencyError, ModelError, RecipeError
from hfcompress.evaluate import load_metric
from hfcompress.job import Source
from hfcompress.recipe import Distill, Finetune, ModelSpec, Prune, Quantize, Stage
from hfcompress.structure import DropLayers
from hfcompress.structure.layers import layers_to_keep
from hfcompress.training import training_options


def check_before_work(source: Source) -> None:
    """Open everything a recipe names, so that a fault shows before the first stage and not hours into it."""
    recipe = source.recipe
    opening.open_config(recipe.model)
    if source.data_labels is not None and len(source.data_labels) < 2:
        raise DataError(f"The training data have only one label, {source.data_labels}; there is nothing to classify.")
    if source.head_is_new and recipe.stages[0].kind != "finetune":
        raise ModelError(
            f"Model '{recipe.model.id}' has no trained classification head. Begin the recipe with a finetune stage."
        )
    for name in recipe.evaluate.metrics or ():
        load_metric(name)
    for stage in recipe.stages:
        _check_stage(source, stage)
    for part in ("train", "held_out"):
        source.encoded(part)


def _check_stage(source: Source, stage: Stage) -> None:
    options = stage.options
    if isinstance(options, DropLayers):
        layers_to_keep(_layers_before(source, stage), options)
    if isinstance(options, (Finetune, Distill)):
        try:
            DistillationConfig(**training_options(options, Path("unused"), source.recipe.seed))
        except (ValueError, ImportError) as error:
            raise RecipeError(f"The training options of stage '{stage.name}' do not go together: {error}") from error
    if isinstance(options, Distill) and options.teacher not in ("original", *_names(source)):
        opening.open_config(ModelSpec(id=options.teacher))
    if isinstance(options, Quantize) and importlib.util.find_spec("compressed_tensors") is None:
        raise MissingDependencyError(
            "Verifying a quantized checkpoint means loading it: pip install 'hfcompress[ct]' for that."
        )
    if isinstance(options, (Prune, Quantize)) and options.method.needs_calibration:
        source.calibration_rows(options)


def _names(source: Source) -> list[str]:
    return [stage.name for stage in source.recipe.stages]


def _layers_before(source: Source, stage: Stage) -> int:
    """Return how many layers the stack has when this stage begins."""
    layers = int(opening.open_config(source.recipe.model).get_text_config().num_hidden_layers)
    for earlier in source.recipe.stages:
        if earlier is stage:
            break
        if isinstance(earlier.options, DropLayers):
            layers = len(layers_to_keep(layers, earlier.options))
    return layers
