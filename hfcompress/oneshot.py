"""Prune a checkpoint without a recipe, as the command line does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfcompress import opening
from hfcompress.checkpoint import save_compressed
from hfcompress.checkpoint.atomic import refuse_foreign
from hfcompress.data import load_train_rows, require_columns
from hfcompress.errors import DataError, look_up
from hfcompress.pruning.oneshot import PruningReport, prune
from hfcompress.recipe import DataSpec, ModelSpec, Prune, read_method
from hfcompress.recipe.faults import Fault, recipe_error
from hfcompress.tasks import TASKS, batches

BATCH_SIZE = 8


def prune_checkpoint(
    model: str, options: Mapping[str, Any], output: Path, *, task: str, data: str | None, text_column: str
) -> PruningReport:
    """Open a model, prune it in one shot, and write it where it is verified by reloading.

    options: those of a recipe's ``prune`` stage.  data: a text file or a dataset id, for methods that need it.
    Everything is checked before the model is opened; nothing is written when something fails.
    """
    stage = _checked(options)
    kind = look_up(TASKS, task, "task")
    refuse_foreign(output)
    spec = ModelSpec(id=model)
    processor = opening.open_processor(spec)
    calibration = None
    if stage.method.needs_calibration:
        if data is None:
            raise DataError(f"{type(stage.method).__name__} needs calibration text: give --data a file or a dataset.")
        found = {"files": (data,)} if os.path.exists(data) else {"id": data}
        source = DataSpec(**found, text_column=text_column)
        raw = load_train_rows(source)
        require_columns(raw, [text_column], source)
        rows = kind.calibration_rows(raw, processor, source, stage.calibration_rows, stage.calibration_length)
        if len(rows) == 0:
            raise DataError(f"{data} has less than {stage.calibration_length} tokens of text, which fill no row.")
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
