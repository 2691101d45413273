"""Prune or quantize a checkpoint without a recipe, as the command line does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress import opening
from hfcompress.checkpoint import save_compressed
from hfcompress.checkpoint.atomic import MARKER, refuse_foreign, write_text
from hfcompress.checkpoint.locks import locked
from hfcompress.checkpoint.verify import require_loader
from hfcompress.data import load_train_rows, require_columns
from hfcompress.errors import DataError, ModelError, OutputError, look_up
from hfcompress.gathering import gather_command_facts
from hfcompress.pruning.oneshot import PruningReport, prune
from hfcompress.pruning.oneshot.plan import plan_weights
from hfcompress.publish import write_model_card
from hfcompress.publish.facts import FILE_NAME as MEASUREMENTS
from hfcompress.quantization import QuantizationReport, quantize
from hfcompress.quantization.bitsandbytes import ALL_IN_MEMORY, BitsAndBytes
from hfcompress.quantization.checks import check_joint_pruning
from hfcompress.quantization.plan import plan_linears
from hfcompress.recipe import DataSpec, ModelSpec, Prune, Quantize, read_method
from hfcompress.recipe.faults import Fault, recipe_error
from hfcompress.structure.lengths import longest_input
from hfcompress.structure.offload import places_on_disk
from hfcompress.structure.stack import layer_stacks
from hfcompress.tasks import TASKS, Task, batches
from hfcompress.tasks.lengths import refuse_longer

BATCH_SIZE = 8
# In the folder beside the output: finished layers, who is working, and what Transformers merged to leave it on disk.
LAYERS, LOCK, MERGED = "layers", "lock", "merged"


@dataclass(frozen=True)
class OneShot:
    """What is asked for: a model, the options of one ``prune`` or ``quantize`` stage, and where the result goes.

    kind: of the stage.  options: as a recipe has them.  data: a file or a dataset's id, for methods that need it.
    overwrite: replace a finished result in the output folder, and discard an unfinished run, which are refused
    otherwise.  resume: go on after the finished layers of an unfinished run.  low_memory: load the dense layers one
    at a time, so that only the packed model has to fit into memory.
    """

    kind: str
    model: str
    options: Mapping[str, Any]
    output: Path
    task: str = "causal-lm"
    data: str | None = None
    text_column: str = "text"
    overwrite: bool = False
    resume: bool = False
    low_memory: bool = False

    def run(self) -> PruningReport | QuantizationReport:
        """Open the model, change it, and write it, with its report, where it is verified by reloading.

        Everything is checked before a weight is loaded.  When something fails nothing is written but the layers that
        were quantized by then, beside the output folder.
        """
        stage = self.stage
        _refuse_output(self.output, self.model, self.overwrite)
        with self._finished_layers() as shards:
            _refuse_untrained_head(self._spec, self._config, self._task)
            processor = opening.open_processor(self._spec, self._task)
            places = self._check_plan(stage)
            calibration = self._calibration(stage, processor) if stage.method.needs_calibration else None
            on_disk = places if self.low_memory else None
            model = opening.open_model(self._spec, self._task, places=on_disk, merged=shards.with_name(MERGED))
            report, summary = _apply_(model, stage, calibration, shards)
            files = {report.file_name: json.dumps(report.to_dict(), indent=2) + "\n"}
            describe = partial(self._write_card, summary, report)
            save_compressed(model, self.output, processor, verify=True, extra_files=files, finish=describe)
            shutil.rmtree(shards, ignore_errors=True)
        return report

    def _write_card(self, summary: str, report: PruningReport | QuantizationReport, folder: Path) -> None:
        """Put facts and card beside the checkpoint.  folder: where it is before it gets its name, the output."""
        facts = gather_command_facts(
            folder,
            self.output,
            self.kind,
            summary,
            report,
            techniques=self._techniques,
            spec=self._spec,
            task=self.task,
            data=self.data,
            words=self.words,
        )
        write_text(folder / MEASUREMENTS, json.dumps(facts, indent=2) + "\n")
        write_model_card(folder)

    @property
    def _techniques(self) -> list[str]:
        if isinstance(self.stage, Prune):
            return ["pruned"]
        return ["quantized", *["pruned"] * (self.stage.prune is not None)]

    @property
    def words(self) -> list[str]:
        """Return the command line that asks for the same."""
        words = ["hfcompress", self.kind, self.model, "--output", str(self.output)]
        for name, value in self.options.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
                continue
            for one in value if isinstance(value, (list, tuple)) else [value]:
                words += [f"--{flag}", one if isinstance(one, str) else json.dumps(one)]
        given = {"data": self.data, "text-column": self.text_column, "task": self.task}
        usual = {"data": None, "text-column": "text", "task": "causal-lm"}
        words += [word for name, value in given.items() if value != usual[name] for word in (f"--{name}", str(value))]
        return [*words, *["--low-memory"] * self.low_memory]

    @contextmanager
    def _finished_layers(self) -> Iterator[Path]:
        """Give the folder of finished layers, for this process alone; it is gone unless it holds some.

        Raises OutputError when there are some, of a run that is neither to be resumed nor to be discarded.
        """
        folder = self.output.with_name(self.output.name + ".partial")
        foreign = sorted({path.name for path in folder.glob("*")} - {LAYERS, LOCK, MERGED})
        if foreign:
            raise OutputError(f"{folder} holds {', '.join(foreign[:9])}, which this command did not write. Move it.")
        try:
            with locked(folder / LOCK, str(folder)):
                if self.overwrite and not self.resume:
                    shutil.rmtree(folder / LAYERS, ignore_errors=True)
                elif (folder / LAYERS).is_dir() and not self.resume:
                    raise OutputError(
                        f"{folder} holds finished layers of an unfinished run. Use --resume to go on after them, or "
                        "--overwrite to discard them."
                    )
                try:
                    yield folder / LAYERS
                finally:
                    shutil.rmtree(folder / MERGED, ignore_errors=True)
        finally:
            with suppress(OSError):
                folder.rmdir()  # only if it is empty

    @cached_property
    def stage(self) -> Prune | Quantize:
        """Return the options, checked; raises RecipeError with all faults."""
        faults: list[Fault] = []
        stage = read_method(self.kind, self.options, (), faults)
        if not isinstance(stage, (Prune, Quantize)):
            raise recipe_error("What is asked for", faults, {})
        return stage

    @cached_property
    def _task(self) -> Task:
        return look_up(TASKS, self.task, "task")

    @property
    def _spec(self) -> ModelSpec:
        return ModelSpec(id=self.model)

    @cached_property
    def _config(self) -> PreTrainedConfig:
        return opening.open_config(self._spec)

    def _check_plan(self, stage: Prune | Quantize) -> dict[str, str]:
        """Return the device map that leaves the model's layers on disk, before its weights are loaded.

        Raises ModelError for what the method cannot do to a model of this config.
        """
        with torch.device("meta"):
            model = getattr(transformers, self._task.auto_class).from_config(self._config)
        if isinstance(stage, Prune):
            plan_weights(model, stage.method, stage.targets, stage.exclude, loaded=False)
            return {}
        if self.low_memory and isinstance(stage.method, BitsAndBytes):
            raise ModelError(f"--low-memory leaves layers on disk. {ALL_IN_MEMORY}")
        require_loader(stage.method.package)
        planned = plan_linears(model, stage.method, loaded=False)
        if stage.prune is not None:
            check_joint_pruning(stage.method, stage.prune, planned)
        return places_on_disk(model, [stack.name for stack in layer_stacks(model)])

    def _calibration(self, stage: Prune | Quantize, processor: Any) -> list[dict[str, Any]]:
        """Return batches of the data's training rows."""
        if self.data is None:
            raise DataError(f"{type(stage.method).__name__} needs calibration text: give --data a file or a dataset.")
        length = stage.calibration_length
        refuse_longer(self.model, longest_input(self._config), "A calibration row (--length)", length)
        found = {"files": (self.data,)} if os.path.isfile(os.path.expanduser(self.data)) else {"id": self.data}
        if not self._task.one_text:
            raise DataError(
                f"Calibration for {self.task} needs more than a column of text. Use a recipe with a {self.kind} stage."
            )
        source = replace(DataSpec(**found, text_column=self.text_column).of(self.task), max_length=length)
        raw = load_train_rows(source)
        require_columns(raw, [self.text_column], source)
        rows = self._task.calibration_rows(raw, processor, source, stage.calibration_rows, length)
        if len(rows) == 0:
            raise DataError(f"{self.data} has less than {length} tokens of text, which fill no row.")
        return batches(rows, self._task.collator(processor, source), BATCH_SIZE)


def _apply_(
    model: PreTrainedModel, stage: Prune | Quantize, calibration: list[dict[str, Any]] | None, shards: Path
) -> tuple[PruningReport | QuantizationReport, str]:
    """Change the model; return the report, and in a line what was done."""
    if isinstance(stage, Prune):
        pruned = prune(model, stage.method, calibration, targets=stage.targets, exclude=stage.exclude)
        return pruned, stage.summary_of(pruned.sparsity)
    return quantize(model, stage.method, calibration, prune=stage.prune, shards=shards), stage.summary


def _refuse_output(output: Path, model: str, overwrite: bool) -> None:
    """Raise OutputError unless the folder is free, or holds a result of ours that may go and is not the model."""
    refuse_foreign(output)
    source, target = (Path(os.path.realpath(Path(path).expanduser())) for path in (model, output))
    if source.is_dir() and target in (source, *source.parents):
        raise OutputError(f"{output} holds the model that is to be compressed. Name another folder for the result.")
    if (output / MARKER).is_file() and not overwrite:
        raise OutputError(f"{output} holds a finished result. Name another folder, or use --overwrite to replace it.")


def _refuse_untrained_head(spec: ModelSpec, config: PreTrainedConfig, task: Task) -> None:
    """Raise ModelError where opening the model makes a classification head of random weights, as nothing trains it."""
    if task.head_name is not None and not opening.has_trained_head(config, task):
        raise ModelError(
            f"Model '{spec.id}' has no trained head for {task.name}, and one-shot methods train none. Run a recipe "
            "that begins with a finetune stage, or name a trained model."
        )
