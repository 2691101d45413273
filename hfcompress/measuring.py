"""Measure a checkpoint folder as a recipe says; the pipeline runs this in a fresh process."""

from __future__ import annotations

from pathlib import Path

from hfcompress.checkpoint import inspect_checkpoint
from hfcompress.evaluate import Measurement, StoredSize, measure
from hfcompress.job import Job, Source
from hfcompress.progress import say
from hfcompress.recipe import Recipe


def evaluate_folder(
    folder: Path, recipe: Recipe, description: str = "measure", with_metrics: bool = True
) -> Measurement:
    """Measure a checkpoint folder on the recipe's held-out data, in this process.

    with_metrics: False measures size, speed and memory alone, for a model whose head has not been trained yet.
    """
    say(description)
    job = Job(Source(recipe), folder, folder)
    model = job.open_model("fast")
    summary = inspect_checkpoint(folder)
    evaluation = recipe.evaluate
    batches = job.held_out_batches()
    return measure(
        model,
        batches=batches if with_metrics else batches[:1],
        metrics=(evaluation.metrics or job.task.metrics) if with_metrics else (),
        tokenizer=job.processor,
        prompt=evaluation.prompt,
        new_tokens=evaluation.new_tokens,
        stored=StoredSize(
            summary.total.parameters, summary.total.nonzero, summary.bytes_on_disk, summary.total.dtypes
        ),
        description=description,
    )
