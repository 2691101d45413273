"""What a finished run knows about its model, recorded and measured on the way: the card says this and nothing else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hfcompress.bundled import is_packaged, packaged_model
from hfcompress.checkpoint import inspect_checkpoint
from hfcompress.checkpoint.atomic import MARKER
from hfcompress.checkpoint.files import weights_digest
from hfcompress.errors import HFCompressError
from hfcompress.evaluate import Measurement, describe_machine
from hfcompress.opening import files_of
from hfcompress.pruning.oneshot import PruningReport
from hfcompress.publish.licence import licence_facts
from hfcompress.publish.sharing import local_names
from hfcompress.quantization import QuantizationReport
from hfcompress.recipe import ModelSpec, Recipe
from hfcompress.recipe.checks import stage_names
from hfcompress.structure import ShrinkReport
from hfcompress.vocabulary import PrunedVocabulary
from hfcompress.workspace import ORIGINAL, Workspace

_NOT_EVALUATED = "none were asked for"
_NO_METRICS = "the command measures no quality, `hfcompress eval` does"
_OF_STAGE = ("summary", "seconds", "machine")
_KIND_OF: dict[type, str] = {PruningReport: "prune", QuantizationReport: "quantize", ShrinkReport: "shrink",
                             PrunedVocabulary: "prune_vocabulary"}  # fmt: skip
_KINDS_OF_UNITS = ("heads", "key_value_heads", "neurons")


def gather_facts(space: Workspace, folder: Path) -> dict[str, Any]:
    """Return the content of ``measurements.json`` for the last checkpoint of a run, in ``folder``."""
    recipe = space.recipe
    verified = json.loads((folder / MARKER).read_text(encoding="utf-8"))["verified"]
    rows, reports = [], []
    for position, stage in enumerate([None, *recipe.stages]):
        name = stage.name if stage else ORIGINAL
        facts = space.facts_of(position, name)
        assert facts is not None
        measured = json.loads(space.measurement_file(position, name).read_text(encoding="utf-8"))
        rows.append({"name": name, **{k: facts.get(k) for k in _OF_STAGE}, "measurement": measured})
        reports.append((name, stage.kind if stage else ORIGINAL, facts["report"] or {}))
    return {
        "hfcompress": version("hfcompress"),
        "name": recipe.name,
        "task": recipe.task,
        "created": datetime.now(timezone.utc).date().isoformat(),
        **base_model(recipe.model),
        "data": recipe.to_dict()["data"],
        "local": local_names([recipe.model.id, recipe.data.id]),
        "recipe": recipe.to_dict(),
        "seed": recipe.seed,
        "inputs": space.inputs,
        "stages": rows,
        **_reloaded(verified),
        **reports_by_layer(reports),
        "layers": layers_of(folder),
        "weights": weights_digest(folder),
    }


def gather_command_facts(
    folder: Path,
    output: Path,
    kind: str,
    summary: str,
    report: PruningReport | QuantizationReport,
    *,
    techniques: list[str],
    spec: ModelSpec,
    task: str,
    data: str | None,
    words: list[str],
) -> dict[str, Any]:
    """Return the content of ``measurements.json`` for what one command made of a model, in ``folder``.

    Before stands what the model's own files hold, where they lie here as safetensors.  output: where the folder will
    be.  kind: of the stage.  summary: what it did.  data: a file or an id.  words: of the command line.
    """
    before, after = counted_original(spec), counted(folder)
    done = {"name": kind, "summary": summary, "seconds": round(report.seconds, 1), "machine": describe_machine()}
    training = {"techniques": techniques, "evaluated": _NO_METRICS, "command": words, "output": str(output)}
    return {
        **_of_one_shot(folder, output.absolute().name, task, spec, data),
        "training": training,
        "stages": _two_stages(before, {**done, "measurement": after.to_dict()}),
        **reports_by_layer([(kind, kind, report.to_dict())]),
    }


def gather_call_facts(
    folder: Path,
    before: Measurement | None,
    after: Measurement,
    reports: Sequence[Any],
    *,
    base: str,
    task: str,
    data: str | None,
) -> dict[str, Any]:
    """Return the content of ``measurements.json`` for what calls in Python made of a model, in ``folder``.

    before, after: the model that it was made from, and the folder's.  reports: what the calls returned, or text that
    says what they did.  base: the model's name.  data: a file or an id, of the rows that were measured on.
    """
    took = [one.seconds for one in reports if hasattr(one, "seconds")]
    seconds = round(sum(took), 1) if took and len(took) == len(reports) else None
    summary = "; ".join(one if isinstance(one, str) else one.summary for one in reports)
    done = {"name": "compressed", "summary": summary or None, "seconds": seconds, "machine": describe_machine()}
    known = [(one, _KIND_OF[type(one)]) for one in reports if type(one) in _KIND_OF]
    kinds = {kind for _, kind in known}
    techniques = ["quantized"] * ("quantize" in kinds)
    if kinds - {"quantize"} or (before is not None and after.parameters < before.parameters):
        techniques.insert(0, "pruned")
    training = {"techniques": techniques, "evaluated": _NOT_EVALUATED, "command": [], "output": str(folder)}
    rows = [one.to_dict() if hasattr(one, "to_dict") else vars(one) for one, _ in known]
    names = stage_names([kind for _, kind in known])
    return {
        **_of_one_shot(folder, folder.absolute().name, task, ModelSpec(id=base), data),
        "training": training,
        "stages": _two_stages(before, {**done, "measurement": after.to_dict()}),
        **reports_by_layer((name, kind, found) for name, (_, kind), found in zip(names, known, rows)),
    }


def _of_one_shot(folder: Path, name: str, task: str, spec: ModelSpec, data: str | None) -> dict[str, Any]:
    """Return what is known of a checkpoint that no recipe made: what it is, from what, and how it reloaded."""
    marker, weights = folder / MARKER, weights_digest(folder)
    saved = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else {}
    # Plain save_pretrained leaves the marker of what was there before.
    verified = saved["verified"] if saved.get("weights") == weights else None
    return {
        "hfcompress": version("hfcompress"),
        "name": name,
        "task": task,
        "created": datetime.now(timezone.utc).date().isoformat(),
        **base_model(spec),
        "data": data and {"files" if os.path.isfile(os.path.expanduser(data)) else "id": data},
        "local": local_names([spec.id, data]),
        **_reloaded(verified),
        "layers": layers_of(folder),
        "weights": weights,
    }


def _two_stages(before: Measurement | None, done: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the original, where something is known of it, and what was done to it."""
    was = {"name": ORIGINAL, "summary": "as it was opened", "seconds": None}
    return [*([] if before is None else [{**was, "measurement": before.to_dict()}]), done]


def counted_original(spec: ModelSpec) -> Measurement | None:
    """Return what a model's own files hold, None where they are not here or of a format that is not counted."""
    with suppress(HFCompressError):  # the result is whole by now, and its card does without
        folder = files_of(spec)
        return None if folder is None else counted(folder)
    return None


def counted(folder: Path) -> Measurement:
    """Return what a checkpoint's files hold; nothing of it was run."""
    found = inspect_checkpoint(folder)
    total = found.total
    return Measurement(
        total.parameters,
        total.nonzero,
        {},
        found.bytes_on_disk,
        stored_dtypes=total.dtypes,
        machine=describe_machine(),
    )


def _reloaded(verified: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a card says of the reload in a fresh process; None: there was none."""
    if verified is None:
        return {"loads_without_hfcompress": None, "verification": None}
    with_hfcompress = bool(verified["with_hfcompress"])
    return {
        "loads_without_hfcompress": not with_hfcompress,
        "verification": {"hfcompress" if with_hfcompress else "stock": verified},
    }


def reports_by_layer(reports: Iterable[tuple[str, str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return what stages reported of single layers: kept heads and neurons, and the rows of pruning and quantizing.

    reports: of each stage its name, its kind and its report.  Heads and neurons are (before the first stage that
    removed any, after the last) for each block; rows of pruning name their stage, as several may prune.
    """
    structure: dict[str, dict[str, list[int]]] = {}
    rows: dict[str, Any] = {"pruning_report": None, "quantization_report": None, "tuning": None}
    for name, kind, report in reports:
        for units in _KINDS_OF_UNITS:
            for block, (before, after) in report.get(units, {}).items():
                found = structure.setdefault(units, {}).setdefault(block, [before, after])
                found[1] = after
        # A training reports rows of layers only where it quantized them.
        if kind in ("quantize", "finetune", "distill") and "rows" in report:
            rows |= {"quantization_report": report["rows"], "tuning": report.get("tuning")}
        elif kind == "prune":
            rows["pruning_report"] = [
                *(rows["pruning_report"] or ()),
                *({"stage": name, **row} for row in report["rows"]),
            ]
    return {"structure": structure or None, **rows}


def layers_of(folder: Path) -> list[dict[str, Any]]:
    """Return name, parameters, non-zeros and bytes of each layer of a checkpoint, counted from its tensors."""
    layers = inspect_checkpoint(folder).layers
    return [{"name": one.name, "parameters": one.parameters, "nonzero": one.nonzero, "bytes": one.bytes}
            for one in layers]  # fmt: skip


def base_model(spec: ModelSpec) -> dict[str, Any]:
    """Return the name and the licence of the model that a run began with."""
    if is_packaged(spec.id):
        packaged = packaged_model(spec.id)
        return {"base_model": packaged.hub_id, "base_model_license": packaged.license}
    return {"base_model": spec.id, **licence_facts(spec.id, spec.revision)}


def benchmark_entry(recipe: Recipe, facts: Mapping[str, Any]) -> str | None:
    """Return the text of a file for ``.eval_results/``, or None when the recipe names no registered benchmark."""
    benchmark = recipe.evaluate.benchmark
    if benchmark is None:
        return None
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from yaml import safe_dump

    found = Measurement.from_dict(facts["stages"][-1]["measurement"])
    name = benchmark.metric or next(iter(found.metrics))
    value = found.metrics.get(name)
    if value is None or not math.isfinite(value):
        return None
    entry = EvalResultEntry(
        dataset_id=benchmark.id, task_id=benchmark.task, value=value, date=facts["created"],
        notes=f"{name}, measured by hfcompress {facts['hfcompress']} on the reloaded checkpoint",
    )  # fmt: skip
    return safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
