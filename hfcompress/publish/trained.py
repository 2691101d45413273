"""The card of a model that a Trainer made, without a recipe: what its callbacks were told and what it logged."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel, Trainer

from hfcompress.checkpoint import inspect_checkpoint, save_compressed
from hfcompress.checkpoint.atomic import write_text
from hfcompress.checkpoint.files import weights_digest
from hfcompress.checkpoint.verify import Verification
from hfcompress.errors import HFCompressError
from hfcompress.evaluate import Measurement, describe_machine
from hfcompress.packed import packed_layers
from hfcompress.publish.card import write_model_card
from hfcompress.publish.evaluations import Evaluation, last_evaluation
from hfcompress.publish.facts import FILE_NAME
from hfcompress.publish.licence import licence_facts
from hfcompress.publish.loading import TASK_PAGES
from hfcompress.publish.sharing import is_cached, local_names

_TOLD = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "lr_scheduler_type",
         "gradient_accumulation_steps", "bf16", "fp16", "temperature", "alpha")  # fmt: skip


def is_sharded(trainer: Trainer) -> bool:
    """Whether several processes hold the weights together: FSDP, DeepSpeed, or Transformers that split them."""
    split = getattr(trainer, "is_distributed_loading_by_transformers", False)
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or split)


def facts_of_trainer(
    trainer: Trainer,
    folder: Path,
    *,
    name: str | None = None,
    verified: Verification | None = None,
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of ``measurements.json`` for a Trainer's model, saved in ``folder``.

    verified: how the saved model compared when it was reloaded; None says that it was not.  data: what the Trainer's
    ``eval_dataset`` is of.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    callbacks = [one for one in trainer.callback_handler.callbacks if hasattr(one, "reached")]
    telling = [
        one for one in trainer.callback_handler.callbacks if dataclasses.is_dataclass(getattr(one, "options", None))
    ]
    teacher = getattr(trainer, "teacher_model", None)
    techniques = {"pruned": bool(callbacks), "distilled": teacher is not None, "quantized": bool(packed_layers(model))}
    found = last_evaluation(trainer)
    if _rounds_weights(model):
        found = Evaluation({}, "the Trainer evaluated rounded weights, and these files hold them unrounded")
    done = ", ".join([f"{trainer.state.global_step} steps", *_shares(callbacks, model)])
    summary = inspect_checkpoint(folder)
    origin = getattr(model.config, "_name_or_path", "")
    base = origin or type(model).__name__
    # What neither lies here nor was fetched from the Hub was a folder that has gone: its name may be a stranger's id.
    known = bool(local_names([origin])) or is_cached(origin)
    measured = Measurement(
        parameters=summary.total.parameters, nonzero=summary.total.nonzero, metrics=found.metrics,
        bytes_on_disk=summary.bytes_on_disk, dtype=str(model.dtype).removeprefix("torch."),
        stored_dtypes=summary.total.dtypes, device=str(trainer.args.device), machine=describe_machine(),
        rows=found.rows,
    )  # fmt: skip
    return {
        "hfcompress": version("hfcompress"),
        "name": name or Path(str(trainer.args.output_dir)).absolute().name,
        "task": task_of(type(model)),
        "created": datetime.now(timezone.utc).date().isoformat(),
        "base_model": base,
        **(licence_facts(origin) if known else {"base_model_license": None}),
        "data": None if found.is_of_other_data else data,
        "local": local_names([origin]) if known else [base],
        "recipe": None,
        "seed": trainer.args.seed,
        "training": {
            "techniques": [name for name, was in techniques.items() if was],
            "tags": list(getattr(model, "model_tags", None) or ()),
            "evaluated": found.told,
            "options": _told(trainer, telling, teacher),
        },
        "stages": [{"name": "trained", "summary": done, "seconds": _runtime(trainer),
                    "machine": measured.machine, "measurement": measured.to_dict()}],
        "loads_without_hfcompress": None if verified is None else not verified.with_hfcompress,
        "verification": {} if verified is None else {
            "hfcompress" if verified.with_hfcompress else "stock": dataclasses.asdict(verified)},
        "layers": [{"name": one.name, "parameters": one.parameters, "nonzero": one.nonzero, "bytes": one.bytes}
                   for one in summary.layers],
        "weights": weights_digest(folder),
    }  # fmt: skip


def _rounds_weights(model: nn.Module) -> bool:
    """Whether layers compute with weights other than those they save, as quantization-aware training has them do."""
    return any(hasattr(module, "rounded_weight") for module in model.modules())


def _shares(callbacks: Iterable[Any], model: nn.Module) -> list[str]:
    """Say which share each callback has pruned, as far as the model still has what it counts."""
    found = []
    for one in callbacks:
        with suppress(HFCompressError):  # as of a model that was packed or shrunk since
            found.append(f"{one.reached(model):.1%} of the targeted {one.what} pruned")
    return found


def _runtime(trainer: Trainer) -> float | None:
    found = [logs["train_runtime"] for logs in trainer.state.log_history if "train_runtime" in logs]
    return float(found[-1]) if found else None


def task_of(kind: type[PreTrainedModel]) -> str:
    """Return the task by the Auto class that knows a model's class."""
    for task, page in TASK_PAGES.items():
        auto = getattr(transformers, page.auto_class, None)
        known = getattr(auto, "_model_mapping", {})
        if kind.config_class in known and kind is known[kind.config_class]:
            return task
    return "feature-extraction"


def _told(trainer: Trainer, callbacks: list[Any], teacher: Any) -> dict[str, Any]:
    """Return the options of callbacks and the arguments that decide a training, as plain values."""
    told: dict[str, Any] = {}
    for one in callbacks:
        options = {field.name: getattr(one.options, field.name) for field in dataclasses.fields(one.options)}
        told[type(one).__name__] = ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)
    if teacher is not None:
        told["teacher"] = ", ".join(_name_of(one) for one in (teacher if isinstance(teacher, list) else [teacher]))
    for name in _TOLD:
        value = getattr(trainer.args, name, None)
        if value is not None:
            told[name] = str(getattr(value, "value", value))
    return told


def _name_of(teacher: Any) -> str:
    """Return what a teacher is called: the name it was opened by, its class, or the folder of its answers."""
    if isinstance(teacher, (str, Path)):
        return Path(teacher).name
    return getattr(getattr(teacher, "config", None), "_name_or_path", "") or type(teacher).__name__


@contextmanager
def saved_for_push(trainer: Any) -> Iterator[Path]:
    """Save a Trainer's model, verified by reloading, with the card of its training, for the length of the block."""
    if not isinstance(trainer, Trainer):
        raise HFCompressError(f"push takes a checkpoint folder or a Trainer, not a {type(trainer).__name__}.")
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PreTrainedModel):
        raise HFCompressError(f"push needs a PreTrainedModel in the Trainer, not a {type(model).__name__}.")
    if is_sharded(trainer):
        raise HFCompressError(
            "The weights are sharded, and one process cannot save them alone for push. Call trainer.push_to_hub(), or "
            "trainer.save_model() in every process, and then push the folder that has them and their card."
        )
    if _rounds_weights(model):
        raise HFCompressError(
            "The model computes with rounded weights that its files would not hold. Call the callback's "
            "export(trainer.model) first; then what is pushed is exactly what was trained."
        )
    with tempfile.TemporaryDirectory(prefix="hfcompress-push-") as scratch:
        folder = Path(scratch) / Path(str(trainer.args.output_dir)).absolute().name
        saved = save_compressed(model, folder, trainer.processing_class, verify=True)
        facts = facts_of_trainer(trainer, folder, verified=saved.verification)
        write_text(folder / FILE_NAME, json.dumps(facts, indent=2, allow_nan=False) + "\n")
        write_model_card(folder)
        yield folder
