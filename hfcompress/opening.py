"""Open models and processors from the Hub, a local folder or a package; check them before any long work."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hfcompress.bundled import is_packaged, packaged_model
from hfcompress.checkpoint import read_header, refuse_nan, weight_files
from hfcompress.checkpoint.files import deciding_files, digest_of
from hfcompress.errors import MissingDependencyError, ModelError
from hfcompress.progress import quiet_bars
from hfcompress.recipe import ModelSpec
from hfcompress.tasks import Head, Task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_model(
    spec: ModelSpec,
    task: Task,
    head: Head | None = None,
    config: PreTrainedConfig | None = None,
    places: Mapping[str, str] | None = None,
    merged: Path | None = None,
) -> PreTrainedModel:
    """Open the model for a task, in evaluation mode, with its weights checked.

    head: what a new head is made for, with class names in its order; None leaves the config's own.
    config: the model's own, where ``open_config`` has read it before: from a GGUF file that takes seconds.
    places: a ``device_map``; weights whose place is ``disk`` stay in the files until they are called.  merged: a
    folder for those of them that Transformers puts together while loading, such as experts.
    Raises ModelError when there is no such model or a weight is NaN or infinite; CheckpointError when a file of a
    local folder is damaged.
    """
    config = copy.deepcopy(config) if config is not None else open_config(spec)
    where, options = _location(spec)
    options["config"] = config
    if "gguf_file" not in options:
        options["use_safetensors"] = True
    else:
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if head is not None and not has_trained_head(config, task):
        _name_classes(config, head)
    auto_class = getattr(transformers, task.auto_class)
    if places is not None:
        options |= {"device_map": dict(places), "offload_folder": merged}
    dtype = DTYPES.get(spec.dtype, "auto")
    try:
        with quiet_bars(os.path.isdir(where) and "gguf_file" not in options):
            model, loaded = auto_class.from_pretrained(where, dtype=dtype, output_loading_info=True, **options)
    except ImportError as error:
        raise MissingDependencyError(f"Model '{spec.id}' needs another package: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"Model '{spec.id}' cannot be opened for {task.name}: {error}") from error
    _refuse_missing(spec, task, config, loaded["missing_keys"])
    if "gguf_file" in options and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it names the file, which the dense model no longer needs
    refuse_nan(model)
    return model.eval()


def refuse_other_class(spec: ModelSpec, config: PreTrainedConfig, task: Task) -> None:
    """Raise ModelError for a checkpoint of a class that lacks weights of the task's class, before it is opened.

    Known from the config alone; nothing is said of classes that are not in Transformers.
    """
    mapping = getattr(transformers, task.auto_class)._model_mapping
    named = next(iter(config.architectures or []), "")
    saved = getattr(transformers, named, None)
    if saved is None or type(config) not in mapping or mapping[type(config)] is saved:
        return
    with torch.device("meta"):
        wanted, there = (_weights(one(copy.deepcopy(config))) for one in (mapping[type(config)], saved))
    _refuse_missing(spec, task, config, wanted - there)


def skeleton(task: Task, config: PreTrainedConfig, head: Head | None) -> PreTrainedModel | None:
    """Return the model that a task opens, without weights; None for classes that are not in Transformers.

    head: what a new head is made for.
    """
    auto_class, config = getattr(transformers, task.auto_class), copy.deepcopy(config)
    if type(config) not in auto_class._model_mapping:
        return None
    if head is not None and not has_trained_head(config, task):
        _name_classes(config, head)
    with torch.device("meta"):
        model: PreTrainedModel = auto_class.from_config(config)
    return model


def _name_classes(config: PreTrainedConfig, head: Head) -> None:
    names = head.names or ("LABEL_0",)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def _weights(model: PreTrainedModel) -> set[str]:
    """Return the names of a model's own weights, tied ones once, as they are called below its head."""
    return {name.removeprefix(f"{model.base_model_prefix}.") for name, _ in model.named_parameters()}


def _refuse_missing(spec: ModelSpec, task: Task, config: PreTrainedConfig, missing: Iterable[str]) -> None:
    """Raise ModelError for weights that the checkpoint lacks: they would be random.  Those of a new head may be."""
    names = sorted(name for name in missing if not name.startswith(task.spare))
    if names and (task.head_name is None or has_trained_head(config, task)):
        raise ModelError(
            f"Model '{spec.id}' lacks {len(names)} weights of a {task.name} model, among them "
            f"{', '.join(names[:3])}; they would be random. Is it a checkpoint for this task?"
        )


def open_processor(spec: ModelSpec, task: Task | None = None) -> Any:
    """Open what makes the model's inputs for a task: an image processor, one of sounds, else its tokenizer.

    Raises ModelError when the model has none.
    """
    where, options = _location(spec)
    kind = "AutoTokenizer" if task is None else task.auto_processor
    what = "tokenizer" if kind == "AutoTokenizer" else "processor"
    try:
        processor = getattr(transformers, kind).from_pretrained(where, **options)
    except ImportError as error:
        raise MissingDependencyError(f"The {what} of '{spec.id}' needs another package: {error}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"Model '{spec.id}' has no {what} that can be opened: {error}") from error
    if what == "tokenizer" and processor.pad_token is None:
        processor.pad_token = processor.eos_token
    return processor


def _location(spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """Return what from_pretrained takes as name, and its options."""
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if is_packaged(spec.id):
        packaged = packaged_model(spec.id)
        if packaged.gguf_file is not None:
            options["gguf_file"] = packaged.gguf_file
        return str(packaged.path()), options
    folder = Path(spec.id).expanduser()
    if folder.is_dir():
        for file in weight_files(folder):
            read_header(file)
        return str(folder), options
    if spec.id.startswith((".", "/", "~")) or spec.id.count("/") > 1:
        raise _not_there(spec, f"No such model folder: {spec.id}.")
    return spec.id, {**options, "revision": spec.revision or "main"}


def files_of(spec: ModelSpec) -> Path | None:
    """Return the folder in which a model's weights lie here as safetensors; None where they do not."""
    where, options = _location(spec)
    if "gguf_file" in options:
        return None
    if os.path.isdir(where):
        return Path(where)
    found = try_to_load_from_cache(where, "config.json", revision=options["revision"])
    return Path(found).parent if isinstance(found, str) else None


def open_config(spec: ModelSpec) -> PreTrainedConfig:
    """Open the model's config.  Raises ModelError when there is no such model."""
    where, options = _location(spec)
    try:
        return AutoConfig.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        raise _not_there(
            spec,
            f"No model '{spec.id}': it is not a folder here, and the Hub, as this machine reaches it, does not give "
            f"it. ({type(error).__name__}: {str(error).splitlines()[0]})",
        ) from error


def _not_there(spec: ModelSpec, text: str) -> ModelError:
    """Return the error for a model that is missing; it names the command that writes the model, if one is known."""
    return ModelError(text + (f" The model is written by: {spec.written_by}" if spec.written_by else ""))


def has_trained_head(config: PreTrainedConfig, task: Task) -> bool:
    """Tell whether a checkpoint holds the task's head, from the class that saved it."""
    return any(str(task.head_name) in name for name in config.architectures or [])


def head_labels(spec: ModelSpec, wanted: Head, task: Task) -> list[str]:
    """Return the class names in the order of the model's head, or the data's where the head is new.

    A trained head's own names win where they are the data's names.  Numbers on either side stand for the head's order.
    Raises ModelError when a trained head has another number of classes, other names, or is for another problem.
    """
    config, of_data = open_config(spec), list(wanted.names)
    if not has_trained_head(config, task):
        return of_data
    if config.problem_type is not None and wanted.problem not in (None, config.problem_type):
        raise ModelError(
            f"Model '{spec.id}' has a trained head for {config.problem_type}, but the data are for {wanted.problem}. "
            "Use other data, or a model without a head."
        )
    if config.num_labels != wanted.size:
        raise ModelError(
            f"Model '{spec.id}' has a trained head of {config.num_labels} labels, but the data have {wanted.size}: "
            f"{', '.join(of_data[:9]) or 'a number'}. Use data with the model's labels, or a model without a head."
        )
    own = list((config.id2label or {}).values())
    if set(own) == set(of_data) or not of_data:
        return own if of_data else []
    numbered = [str(index) for index in range(len(own))]
    if of_data == numbered or own in (numbered, [f"LABEL_{index}" for index in range(len(own))]):
        return of_data
    raise ModelError(
        f"Model '{spec.id}' has labels {', '.join(own[:9])}, but the data have {', '.join(of_data[:9])}, and which is "
        "which cannot be known. Rename the data's labels to the model's, or number them as the model does."
    )


def model_digest(spec: ModelSpec) -> str:
    """Return a digest of what a local model consists of, or a Hub model's id and the commit that its revision is.

    The commit is the one that ``open_config`` has found; where no commit can be known, the revision's name stands.
    """
    where, options = _location(spec)
    if os.path.isdir(where):
        folder = Path(where)
        gguf = options.get("gguf_file")
        return digest_of(folder, [folder / gguf] if gguf else deciding_files(folder))
    config = try_to_load_from_cache(where, "config.json", revision=options["revision"])
    commit = Path(config).parent.name if isinstance(config, str) else options["revision"]
    return f"{where}@{commit}"
