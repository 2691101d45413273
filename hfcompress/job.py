"""A job: the model's folder, its tokenizer and its data, as the stages of a recipe see them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import DatasetDict
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress import data as opening_data
from hfcompress import opening
from hfcompress.devices import fast_bfloat16
from hfcompress.distillation.teachers import is_cache
from hfcompress.errors import DataError
from hfcompress.progress import busy
from hfcompress.recipe import ModelSpec, Prune, Quantize, Recipe
from hfcompress.tasks import TASKS, Head, HeldOut, Task, batches
from hfcompress.tasks.inputs import without_labels

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
        """Return the original model's tokenizer, image processor or processor, unless a stage has changed it."""
        model = self.recipe.model
        return opening.open_processor(
            model
            if self.tokenizer is None
            else ModelSpec(str(self.tokenizer), trust_remote_code=model.trust_remote_code),
            self.task,
        )

    @cached_property
    def raw(self) -> DatasetDict:
        """Return the raw splits, with their columns checked."""
        recipe = self.recipe
        needs_calibration = any(needs_calibration_data(stage.options) for stage in recipe.stages)
        splits = opening_data.load_splits(recipe.data, recipe.seed, needs_calibration)
        for name, part in splits.items():
            opening_data.require_columns(part, self.task.columns(recipe.data), recipe.data)
            splits[name] = self.task.kept(part, recipe.data)
        return splits

    @cached_property
    def head(self) -> Head | None:
        """Return the head that the data ask for, its classes in the order of the model's.

        None for tasks whose data say nothing about it.  Raises DataError for labels that are none, ModelError for a
        trained head that they do not fit.
        """
        head = self.task.head(self.raw["train"], self.recipe.data)
        if head is None:
            return None
        return replace(head, names=tuple(opening.head_labels(self.recipe.model, head, self.task)))

    @property
    def labels(self) -> list[str] | None:
        """Return the class names in the order of the model's head, none for a regression; None for other tasks."""
        return None if self.head is None else list(self.head.names)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the metrics that the recipe names, or those of its task."""
        return self.recipe.evaluate.metrics or self.task.metrics_for(self.head)

    @cached_property
    def _encoded(self) -> dict[str, Any]:
        return {}

    def encoded(self, part: str) -> Any:
        """Return one part of the data as rows that the model takes, with labels, made once."""
        if part not in self._encoded:
            self._encoded[part] = self.task.encode(self.raw[part], self.processor, self.recipe.data, self.labels)
        return self._encoded[part]

    def texts(self) -> Iterator[str]:
        """Yield the texts whose tokens a smaller vocabulary must have; see ``PruneVocabulary``."""
        for part in ("train", "calibration") if self.task.head_name is not None else tuple(self.raw):
            if part in self.raw:
                yield from self.task.texts(self.raw[part], self.recipe.data)

    def held_out(self) -> tuple[Any, HeldOut]:
        """Return the encoded rows that every measurement uses, and what their answers are read against."""
        recipe, limit, rows = self.recipe, self.recipe.evaluate.max_rows, self.raw["held_out"]
        if limit is None:
            encoded = self.encoded("held_out")
        elif self.task.packs:
            encoded = self.encoded("held_out")
            encoded = encoded.select(range(min(len(encoded), limit)))
        else:
            rows = rows.select(range(min(len(rows), limit)))
            encoded = self.task.encode(rows, self.processor, recipe.data, self.labels)
        beams = recipe.evaluate.num_beams or 1
        return encoded, HeldOut(rows, self.processor, recipe.data, self.labels, self.open_original, beams)

    def calibration_rows(self, options: Prune | Quantize) -> Any:
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
        return self.task.head_name is not None and not opening.has_trained_head(self.config, self.task)

    def open_original(self) -> PreTrainedModel:
        """Open the recipe's model; see ``opening.open_model`` for the errors."""
        return self.open(self.recipe.model, self.head, self.config)

    def open(
        self, spec: ModelSpec, head: Head | None = None, config: PreTrainedConfig | None = None
    ) -> PreTrainedModel:
        """Open any model for the recipe's task and its batches."""
        # A Hub id and a file to convert bring their libraries' own bars.
        with busy(f"opening {Path(spec.id).name}") if Path(spec.id).is_dir() else nullcontext():
            model = opening.open_model(spec, self.task, head, config)
        self.task.prepare_(model, self.processor, self.head)
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
        """Return the tokenizer, image processor or processor."""
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

    def teacher_processor(self, name: str) -> Any:
        """Open the tokenizer of a teacher that is a model; see ``teacher``."""
        folder = self.finished.get(name)
        return opening.open_processor(ModelSpec(id=name) if folder is None else self._spec(folder), self.task)

    def collator(self, seed: int | None = None) -> Any:
        """Return the function that makes a batch of encoded rows.  seed: of what is random in it."""
        return self.task.collator(self.processor, self.recipe.data, seed)

    def held_out_batches(self) -> tuple[list[dict[str, Tensor]], HeldOut]:
        """Return the batches that every measurement of this recipe uses, and what their answers are read against."""
        rows, held_out = self.source.held_out()
        return batches(rows, self.collator(self.recipe.seed), self.recipe.evaluate.batch_size), held_out

    def calibration_batches(self, options: Prune | Quantize, batch_size: int = 8) -> list[dict[str, Tensor]]:
        """Return calibration batches without labels; a decoder is shown the right tokens so far."""
        rows = self.source.calibration_rows(options)
        config = opening.open_config(self._spec(self.folder))
        return [without_labels(batch, config) for batch in batches(rows, self.collator(self.recipe.seed), batch_size)]

    def training_batches(self, rows: int, batch_size: int = 8) -> list[dict[str, Tensor]]:
        """Return batches of the first training rows, with their labels."""
        data = self.source.encoded("train")
        few = data.select(range(min(rows, len(data))))
        return batches(few, self.collator(self.recipe.seed), batch_size)

    def example(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the inputs of one row, with which a model is verified and looked into."""
        rows = self.source.encoded("held_out")
        return without_labels(batches(rows.select(range(1)), self.collator(self.recipe.seed), 1)[0], model.config)

    def after(self, name: str, folder: Path, work: Path) -> Job:
        """Return the job of the next stage, which starts from the checkpoint of stage ``name``."""
        source, kinds = self.source, {stage.name: stage.kind for stage in self.recipe.stages}
        if kinds.get(name) == "prune_vocabulary":
            source = replace(source, tokenizer=folder)
        return replace(self, source=source, folder=folder, work=work, finished={**self.finished, name: folder})
