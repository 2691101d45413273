"""The card of a checkpoint that calls in Python made: what they reported, and what its folder then measures."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

from hfcompress import publish
from hfcompress.checkpoint.atomic import list_own_files, write_text
from hfcompress.checkpoint.files import read_json
from hfcompress.errors import CheckpointError, ModelError, OutputError
from hfcompress.evaluate import Measurement, StoredSize, measure
from hfcompress.gathering import counted, counted_original, gather_call_facts
from hfcompress.publish.card import keep_edited
from hfcompress.publish.facts import FILE_NAME, load_facts
from hfcompress.publish.trained import task_of
from hfcompress.recipe import ModelSpec


def write_model_card(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    base_model: str | None = None,
    reports: Sequence[Any] = (),
    before: Measurement | None = None,
    data: str | None = None,
    **measuring: Any,
) -> Path:
    """Write ``README.md``, and its pictures, into a checkpoint folder from what was measured; works offline.

    Recipes, commands and Trainers leave a ``measurements.json``, from which the card is rendered anew.  For a
    checkpoint that calls in Python made, name its base model: the folder is then counted, reloaded and measured, and
    ``measurements.json`` written first.  A card that somebody edited is kept beside it, as ``README.edited.md``.
    repo_id: what the loading example names; None is the folder.
    base_model: the id or folder of the model that it was made from.
    reports: what ``prune``, ``quantize``, ``shrink`` and ``prune_vocabulary`` returned, or text that says what was
    done.
    before: what ``measure`` found on the model as it was; its size on disk is counted where its files are here.
    data: the dataset or file of the rows in measuring.
    measuring: what ``measure`` takes, such as ``batches`` and ``metrics``, for the reloaded checkpoint, on the device
    of before; without, the files are counted and nothing is run.
    Raises CheckpointError for a damaged folder or one without measurements and base_model, DataError for wrong
    measurements, and OutputError where they are a recipe's, a command's or a Trainer's and would be lost.
    """
    folder = Path(folder).expanduser()
    asked = {"reports": reports, "before": before, "data": data, **measuring}
    if base_model is None:
        given = [name for name, value in asked.items() if value]
        if given:
            raise TypeError(f"{', '.join(given)}: these arguments need base_model=, the model that it was made from.")
        load_facts(folder)  # a folder without them keeps the card that it has
        keep_edited(folder)
        return publish.write_model_card(folder, repo_id)
    if isinstance(reports, str) or not all(isinstance(one, str) or hasattr(one, "summary") for one in reports):
        raise TypeError("The argument reports is a list of what prune, quantize and such returned, or of texts.")
    if measuring:
        inspect.signature(measure).bind(None, **measuring)  # a TypeError now, and not after the checkpoint was read
    _refuse_known(folder)
    was, after, kind = _before(before, base_model), counted(folder), _class_of(folder)
    if measuring:
        after = _reloaded(folder, kind, after, before, measuring)
    facts = gather_call_facts(folder, was, after, reports, base=base_model, task=task_of(kind), data=data)
    keep_edited(folder)
    write_text(folder / FILE_NAME, json.dumps(facts, indent=2, allow_nan=False) + "\n")
    list_own_files(folder, [FILE_NAME])
    return publish.write_model_card(folder, repo_id)


def _refuse_known(folder: Path) -> None:
    """Raise OutputError where a folder has measurements that this would lose."""
    if (folder / FILE_NAME).is_file() and load_facts(folder).training.get("command") != []:
        raise OutputError(
            f"{folder} holds the measurements of a recipe's run, a command or a Trainer, which know more. Leave "
            f"base_model out to render their card, or remove {FILE_NAME} if the checkpoint is another one now."
        )


def _class_of(folder: Path) -> Any:
    """Return the class of Transformers that a checkpoint names."""
    named = next(iter(read_json(folder / "config.json").get("architectures") or ()), None)
    found = getattr(transformers, str(named), None)
    if found is None:
        raise ModelError(f"{folder}/config.json names {named or 'no class'}, which is no model class of Transformers.")
    return found


def _before(measured: Measurement | None, base: str) -> Measurement | None:
    """Return what is known of the model as it was: what was measured, with the size of its files if they are its."""
    there = counted_original(ModelSpec(id=base))
    if measured is None:
        return there
    measured = replace(measured, peak_memory_bytes=None)  # of a process that may hold other models, too
    if there is None or (there.parameters, there.nonzero) != (measured.parameters, measured.nonzero):
        return measured
    return replace(measured, bytes_on_disk=there.bytes_on_disk, stored_dtypes=there.stored_dtypes)


def _reloaded(
    folder: Path, kind: Any, files: Measurement, before: Measurement | None, measuring: dict[str, Any]
) -> Measurement:
    """Measure a checkpoint as it comes back from its folder.  files: what was counted there."""
    device = before.device if before is not None else None
    places = {} if device in (None, "cpu") else {"device_map": {"": device}}
    try:
        model = kind.from_pretrained(folder, **places)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not load with {kind.__name__}.from_pretrained: {error}") from error
    stored = StoredSize(files.parameters, files.nonzero, files.bytes_on_disk, files.stored_dtypes)
    found = measure(model, **{"description": f"measure {folder.name}", **measuring}, stored=stored)
    return replace(found, peak_memory_bytes=None)
