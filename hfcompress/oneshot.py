"""Prune a checkpoint without a recipe, as the command line does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hfcompress import opening
from hfcompress.checkpoint import save_compressed
from hfcompress.checkpoint.atomic import MARKER, refuse_foreign
from hfcompress.data import load_train_rows, require_columns
from hfcompress.errors import DataError, ModelError, OutputError, look_up
from hfcompress.pruning.oneshot import PruningReport, prune
from hfcompress.recipe import DataSpec, ModelSpec, Prune, read_method
from hfcompress.recipe.faults import Fault, recipe_error
from hfcompress.tasks import TASKS, Task, batches
from hfcompress.tasks.lengths import longest_input, refuse_longer

BATCH_SIZE = 8


def prune_checkpoint(
    model: str,
    options: Mapping[str, Any],
    output: Path,
    *,
    task: str,
    data: str | None,
    text_column: str,
    overwrite: bool = False,
) -> PruningReport:
    """Open a model, prune it in one shot, and write it where it is verified by reloading.

    options: those of a recipe's ``prune`` stage.  data: a text file or a dataset id, for methods that need it.
    overwrite: replace a finished result in the output folder, which is refused otherwise.
    Everything is checked before the model is opened; nothing is written when something fails.
    """
    stage = _checked(options)
    kind = look_up(TASKS, task, "task")
    _refuse_output(output, model, overwrite)
    spec = ModelSpec(id=model)
    config = opening.open_config(spec)
    _refuse_untrained_head(spec, config, kind)
    processor = opening.open_processor(spec)
    calibration = None
    if stage.method.needs_calibration:
        if data is None:
            raise DataError(f"{type(stage.method).__name__} needs calibration text: give --data a file or a dataset.")
        length = stage.calibration_length
        refuse_longer(model, longest_input(config), "A calibration row (--length)", length)
        found = {"files": (data,)} if os.path.isfile(os.path.expanduser(data)) else {"id": data}
        source = DataSpec(**found, text_column=text_column, max_length=length)
        raw = load_train_rows(source)
        require_columns(raw, [text_column], source)
        rows = kind.calibration_rows(raw, processor, source, stage.calibration_rows, length)
        if len(rows) == 0:
            raise DataError(f"{data} has less than {length} tokens of text, which fill no row.")
        calibration = batches(rows, kind.collator(processor), BATCH_SIZE)
    opened = opening.open_model(spec, kind)
    report = prune(opened, stage.method, calibration, targets=stage.targets, exclude=stage.exclude)
    save_compressed(opened, output, processor, verify=True)
    return report


def _checked(options: Mapping[str, Any]) -> Prune:
    faults: list[Fault] = []
    stage = read_method("prune", options, (), faults)
    if not isinstance(stage, Prune):
        raise recipe_error("What is asked for", faults, {})
    return stage


def _refuse_output(output: Path, model: str, overwrite: bool) -> None:
    """Raise OutputError unless the folder is free, or holds a result of ours that may go and is not the model."""
    refuse_foreign(output)
    source, target = (Path(os.path.realpath(Path(path).expanduser())) for path in (model, output))
    if source.is_dir() and target in (source, *source.parents):
        raise OutputError(f"{output} holds the model that is to be pruned. Name another folder for the result.")
    if (output / MARKER).is_file() and not overwrite:
        raise OutputError(f"{output} holds a finished result. Name another folder, or use --overwrite to replace it.")


def _refuse_untrained_head(spec: ModelSpec, config: PreTrainedConfig, task: Task) -> None:
    """Raise ModelError where opening the model makes a classification head of random weights, as nothing trains it."""
    if task.auto_class == "AutoModelForSequenceClassification" and not opening.has_trained_head(config):
        raise ModelError(
            f"Model '{spec.id}' has no trained classification head, and pruning in one shot trains none. Run a recipe "
            "that begins with a finetune stage, or name a trained classifier."
        )
