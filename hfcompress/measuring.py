"""Measure a checkpoint folder as a recipe says; the pipeline runs this in a fresh process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hfcompress.checkpoint import inspect_checkpoint
from hfcompress.evaluate import Measurement, StoredSize, measure
from hfcompress.job import Job, Source
from hfcompress.progress import say
from hfcompress.recipe import ModelSpec, Recipe


def evaluate_folder(
    folder: Path, recipe: Recipe, description: str = "measure", with_metrics: bool = True
) -> Measurement:
    """Measure a checkpoint folder on the recipe's held-out data, in this process: its own model and its own tokenizer.

    with_metrics: False measures size, speed and memory alone, for a model whose head has not been trained yet.
    """
    say(description)
    published = ModelSpec(id=str(folder), trust_remote_code=recipe.model.trust_remote_code)
    source = Source(dataclasses.replace(recipe, model=published))
    job = Job(source, folder, folder)
    model = job.open_model("fast")
    summary = inspect_checkpoint(folder)
    evaluation = recipe.evaluate
    batches, held_out = job.held_out_batches()
    # Some tasks are measured against the model that the recipe began with.
    held_out = dataclasses.replace(held_out, original=Source(recipe).open_original)
    return measure(
        model,
        batches=batches if with_metrics else batches[:1],
        metrics=source.metrics if with_metrics else (),
        reader=job.task.reader(held_out) if with_metrics else None,
        tokenizer=job.processor,
        prompt=evaluation.prompt,
        new_tokens=evaluation.new_tokens,
        stored=StoredSize(
            summary.total.parameters, summary.total.nonzero, summary.bytes_on_disk, summary.total.dtypes
        ),
        description=description,
    )
