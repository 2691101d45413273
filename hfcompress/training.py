"""Run a Trainer inside a stage: arguments, progress, and checkpoints that survive a kill."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import is_liger_kernel_available

from hfcompress.checkpoint.atomic import to_disk
from hfcompress.devices import fast_bfloat16
from hfcompress.errors import CheckpointError
from hfcompress.progress import Meter, meter, quiet_bars
from hfcompress.recipe import Distill, Finetune
from hfcompress.structure.dropout import dropout_of

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
        # Without it the Trainer refuses bf16 where there is no GPU.
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return {**defaults, **options.training, **length, "disable_tqdm": True, "output_dir": str(work)}


def try_arguments(arguments: TrainingArguments) -> None:
    """Raise what the Trainer raises for arguments it cannot work with: it is made for a model of one weight.

    So packages that are missing, optimizers and schedules with wrong options, and sharding are known before a model
    is opened.
    """
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("use_liger_kernel needs a package: pip install liger-kernel")
    alone = copy.copy(arguments)
    alone.push_to_hub = False
    alone.label_smoothing_factor = 0.0  # for which the Trainer looks into the model's config
    trainer = Trainer(nn.Linear(1, 1), alone, train_dataset=[], eval_dataset=[])
    if not alone.optim_target_modules:  # which a model of one weight has not
        trainer.create_optimizer_and_scheduler(num_training_steps=10)


def train(trainer: Trainer, description: str, dropout: float | None = None, events: Path | None = None) -> None:
    """Train to the end, from the last whole checkpoint if there is one; raise nothing of our own.

    dropout: of every dropout, for this training alone; None leaves each as the model's config says.
    events: the folder of TensorBoard's, if ``report_to`` names it; by default the Trainer's output has them.
    """
    _keep_events(trainer, events)
    trainer.remove_callback(PrinterCallback)  # it prints to standard output, which belongs to results
    work = Path(str(trainer.args.output_dir))
    checkpoint = last_whole_checkpoint(work)
    total = trainer.args.max_steps if trainer.args.max_steps > 0 else None
    trainer.add_callback(_KeepWhole(trainer.args.save_total_limit))
    trainer.args.save_total_limit = None  # it removes old checkpoints before the new one bears its mark
    with meter(description, total) as shown, quiet_bars():
        trainer.add_callback(_ShowProgress(shown))
        with _writing(work), dropout_of(trainer.accelerator.unwrap_model(trainer.model), dropout):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # In mixed precision the model's forward stays wrapped in autocast, with which it answers unlike its reloaded twin.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def _keep_events(trainer: Trainer, folder: Path | None) -> None:
    """Have TensorBoard's events go to a folder, one in it for each attempt, unless the environment says where."""
    for callback in trainer.callback_handler.callbacks:
        if folder is not None and isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))


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
    """Return the newest checkpoint to resume from; half-written and half-removed ones are removed.

    So is one of the end of training: resumed there, the Trainer would take one more step than was asked (unless an
    epoch ends at it, too).
    """
    found = _by_step(work)
    usable = [path for path in found if (path / WHOLE).is_file() and not _is_the_end(path)]
    for path in found:
        if path not in usable:
            shutil.rmtree(path)
    return usable[-1] if usable else None


def _by_step(work: Path) -> list[Path]:
    return sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def _is_the_end(checkpoint: Path) -> bool:
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


class _KeepWhole(TrainerCallback):
    """Mark a checkpoint as whole when all of it is on the disk, and only then remove the oldest ones over the limit.

    The Trainer writes a checkpoint file by file, so the mark comes last, and of an old checkpoint it goes first.
    At every moment after the first save there is a whole checkpoint to resume from, so the one of the end, which is
    none, replaces nothing.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        work = Path(str(args.output_dir))
        newest = work / f"checkpoint-{state.global_step}"
        to_disk(newest)
        (newest / WHOLE).touch()
        if self.limit is None or self.limit <= 0 or state.global_step >= state.max_steps:
            return
        kept = {newest.name, Path(state.best_model_checkpoint or newest).name}
        found = _by_step(work)
        surplus = max(0, len(found) - max(self.limit, len(kept)))
        for path in [path for path in found if path.name not in kept][:surplus]:
            (path / WHOLE).unlink(missing_ok=True)
            shutil.rmtree(path)


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
