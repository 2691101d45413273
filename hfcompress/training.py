"""Run a Trainer inside a stage: arguments, progress, and checkpoints that survive a kill."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from hfcompress.devices import fast_bfloat16
from hfcompress.errors import CheckpointError
from hfcompress.progress import Meter, meter, quiet_bars
from hfcompress.recipe import Distill, Finetune

WHOLE = "hfcompress_whole"


def training_options(options: Finetune | Distill, work: Path, seed: int) -> dict[str, Any]:
    """Return the TrainingArguments of a stage: our defaults, then the recipe's ``training``, then what must be."""
    length = {"max_steps": options.steps} if options.steps is not None else {"num_train_epochs": options.epochs}
    defaults: dict[str, Any] = {
        "seed": seed,
        "save_strategy": "steps",
        "save_steps": 0.25,
        "save_total_limit": 2,
        "logging_steps": 5,
        "report_to": "none",
        "bf16": fast_bfloat16() and not options.training.get("fp16"),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return {**defaults, **options.training, **length, "disable_tqdm": True, "output_dir": str(work)}


def train(trainer: Trainer, description: str) -> None:
    """Train to the end, from the last whole checkpoint if there is one; raise nothing of our own."""
    trainer.remove_callback(PrinterCallback)  # it prints to standard output, which belongs to results
    work = Path(str(trainer.args.output_dir))
    checkpoint = last_whole_checkpoint(work)
    total = trainer.args.max_steps if trainer.args.max_steps > 0 else None
    trainer.add_callback(_MarkWhole)
    with meter(description, total) as shown, quiet_bars():
        trainer.add_callback(_ShowProgress(shown))
        with _writing(work):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


@contextmanager
def _writing(work: Path) -> Iterator[None]:
    """Turn a failed write into one clear error; what earlier checkpoints hold is kept."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise CheckpointError(
            f"A training checkpoint could not be written to {work}: {error}. Earlier ones are kept; free some space "
            "and use --resume to go on."
        ) from error


def last_whole_checkpoint(work: Path) -> Path | None:
    """Return the newest checkpoint to resume from; half-written ones are removed, and one of the end of training.

    Resumed there, the Trainer would take one more step than was asked (unless an epoch ends at it, too).
    """
    found = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        if (path / WHOLE).is_file() and not _is_the_end(path):
            return path
        shutil.rmtree(path)
    return None


def _is_the_end(checkpoint: Path) -> bool:
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


class _MarkWhole(TrainerCallback):
    """The Trainer writes a checkpoint file by file; this mark comes last."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / WHOLE).touch()


class _ShowProgress(TrainerCallback):
    def __init__(self, shown: Meter) -> None:
        self.shown = shown

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.shown.begin(state.max_steps, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.shown.advance_to(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        shown = [f"{name} {logs[name]:.3f}" for name in ("loss", "kd_loss", "task_loss") if name in logs]
        if shown:
            self.shown.advance_to(state.global_step, ", ".join(shown))
