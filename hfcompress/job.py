"""A job: the model's folder, its tokenizer and its data, as the stages of a recipe see them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress import data as opening_data
from hfcompress import opening
from hfcompress.devices import fast_bfloat16
from hfcompress.distillation.teachers import is_cache
from hfcompress.errors import DataError
from hfcompress.progress import busy
from hfcompress.recipe import ModelSpec, Prune, Quantize, Recipe
from hfcompress.tasks import TASKS, Task, batches

Dtype = Literal["auto", "float32", "fast"]


def needs_calibration_data(options: Any) -> bool:
    """Tell whether a stage shows its method calibration rows."""
    return isinstance(options, (Prune, Quantize)) and options.method.needs_calibration


@dataclass(frozen=True)
class Source:
    """The recipe's model and data, opened once and encoded when first used.

    tokenizer: a folder to take it from, where it is no longer the original model's.
    """

    recipe: Recipe
    tokenizer: Path | None = None

    @property
    def task(self) -> Task:
        """Return the recipe's task."""
        return TASKS[self.recipe.task]

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Return the original model's config, read once: from a GGUF file that takes seconds."""
        return opening.open_config(self.recipe.model)

    @cached_property
    def processor(self) -> Any:
        """Return the tokenizer: the original model's, unless a stage has changed it."""
        model = self.recipe.model
        return opening.open_processor(
            model
            if self.tokenizer is None
            else ModelSpec(str(self.tokenizer), trust_remote_code=model.trust_remote_code)
        )

    @cached_property
    def raw(self) -> DatasetDict:
        """Return the raw splits, with their columns checked."""
        recipe = self.recipe
        needs_calibration = any(needs_calibration_data(stage.options) for stage in recipe.stages)
        splits = opening_data.load_splits(recipe.data, recipe.seed, needs_calibration)
        for part in splits.values():
            opening_data.require_columns(part, self.task.columns(recipe.data), recipe.data)
        return splits

    @cached_property
    def data_labels(self) -> list[str] | None:
        """Return the class names found in the training data, None for tasks without classes."""
        if self.recipe.task != "sequence-classification":
            return None
        return opening_data.label_names(self.raw["train"], self.recipe.data.label_column)

    @cached_property
    def labels(self) -> list[str] | None:
        """Return the class names in the order of the model's head; raise ModelError when they don't fit it."""
        if self.data_labels is None:
            return None
        return opening.head_labels(self.recipe.model, self.data_labels)

    @cached_property
    def _encoded(self) -> dict[str, Dataset]:
        return {}

    def encoded(self, part: str) -> Dataset:
        """Return one part of the data as token rows with labels, made once."""
        if part not in self._encoded:
            self._encoded[part] = self.task.encode(self.raw[part], self.processor, self.recipe.data, self.labels)
        return self._encoded[part]

    def texts(self) -> Iterator[str]:
        """Yield the texts whose tokens a smaller vocabulary must have; see ``PruneVocabulary``."""
        data = self.recipe.data
        for part in ("train", "calibration") if self.data_labels is not None else tuple(self.raw):
            for column in (data.text_column, data.text_pair_column):
                if column is not None and part in self.raw:
                    yield from self.raw[part][column]

    def calibration_rows(self, options: Prune | Quantize) -> Dataset:
        """Return the rows for calibration.  Raises DataError when that part of the data fills no row."""
        count, length = options.calibration_rows, options.calibration_length
        rows = self.task.calibration_rows(self.raw["calibration"], self.processor, self.recipe.data, count, length)
        if len(rows) == 0:
            raise DataError(
                f"Calibration has 0 rows: its text has less than {length} tokens (calibration_length). "
                "Give more text, a larger data.held_out_share or a smaller calibration_length."
            )
        return rows

    @cached_property
    def head_is_new(self) -> bool:
        """Tell whether the model has no trained head for the task, so that its first answers are random."""
        return self.data_labels is not None and not opening.has_trained_head(self.config)

    def open_original(self) -> PreTrainedModel:
        """Open the recipe's model; see ``opening.open_model`` for the errors."""
        return self.open(self.recipe.model, self.labels, self.config)

    def open(
        self, spec: ModelSpec, labels: list[str] | None = None, config: PreTrainedConfig | None = None
    ) -> PreTrainedModel:
        """Open any model for the recipe's task and its batches."""
        # A Hub id and a file to convert bring their libraries' own bars.
        with busy(f"opening {Path(spec.id).name}") if Path(spec.id).is_dir() else nullcontext():
            model = opening.open_model(spec, self.task, labels, config)
        self.task.prepare_(model, self.processor)
        return model

    def open_in(self, spec: ModelSpec, dtype: Dtype) -> PreTrainedModel:
        """Open any model in a dtype: ``fast`` is as it was saved, but float32 where bfloat16 products are slow."""
        if dtype == "fast":
            slow = opening.open_config(spec).dtype == torch.bfloat16 and not fast_bfloat16()
            dtype = "float32" if slow else "auto"
        return self.open(replace(spec, dtype=dtype))


@dataclass(frozen=True)
class Job:
    """One stage's view: ``folder`` holds the checkpoint it starts from; ``work`` is its own scratch folder."""

    source: Source
    folder: Path
    work: Path
    finished: dict[str, Path] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """Return the recipe."""
        return self.source.recipe

    @property
    def task(self) -> Task:
        """Return the recipe's task."""
        return self.source.task

    @property
    def processor(self) -> Any:
        """Return the tokenizer."""
        return self.source.processor

    def open_model(self, dtype: Dtype = "auto", folder: Path | None = None) -> PreTrainedModel:
        """Open the checkpoint this stage starts from, or another stage's.

        dtype: ``auto`` is as it was saved; ``fast`` too, but in float32 where bfloat16 products are slow.
        """
        return self.source.open_in(self._spec(folder or self.folder), dtype)

    def _spec(self, folder: Path) -> ModelSpec:
        """Return how to open a checkpoint of this run: its code is trusted if the recipe trusts the model's."""
        return ModelSpec(id=str(folder), trust_remote_code=self.recipe.model.trust_remote_code)

    def saved_dtype(self) -> Any:
        """Return the dtype that the checkpoint this stage starts from is saved in."""
        return opening.open_config(self._spec(self.folder)).dtype

    def teacher(self, name: str) -> PreTrainedModel | Path:
        """Open a teacher: ``original``, an earlier stage by name, or any model id; a folder of answers stays one."""
        if is_cache(name):
            return Path(name).expanduser()
        folder = self.finished.get(name)
        return self.source.open_in(ModelSpec(id=name) if folder is None else self._spec(folder), "fast")

    def held_out_batches(self) -> list[dict[str, Tensor]]:
        """Return the batches that every measurement of this recipe uses."""
        rows = self.source.encoded("held_out")
        limit = self.recipe.evaluate.max_rows
        rows = rows.select(range(min(len(rows), limit))) if limit else rows
        return batches(rows, self.task.collator(self.processor), self.recipe.evaluate.batch_size)

    def calibration_batches(self, options: Prune | Quantize, batch_size: int = 8) -> list[dict[str, Tensor]]:
        """Return calibration batches of unlabelled rows."""
        return batches(self.source.calibration_rows(options), self.task.collator(self.processor), batch_size)

    def training_batches(self, rows: int, batch_size: int = 8) -> list[dict[str, Tensor]]:
        """Return batches of the first training rows, with their labels."""
        data = self.source.encoded("train")
        return batches(data.select(range(min(rows, len(data)))), self.task.collator(self.processor), batch_size)

    def after(self, name: str, folder: Path, work: Path) -> Job:
        """Return the job of the next stage, which starts from the checkpoint of stage ``name``."""
        source, kinds = self.source, {stage.name: stage.kind for stage in self.recipe.stages}
        if kinds.get(name) == "prune_vocabulary":
            source = replace(source, tokenizer=folder)
        return replace(self, source=source, folder=folder, work=work, finished={**self.finished, name: folder})
