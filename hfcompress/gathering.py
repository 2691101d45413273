"""What a finished run knows about its model, recorded and measured on the way: the card says this and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hfcompress.bundled import is_packaged, packaged_model
from hfcompress.checkpoint import inspect_checkpoint
from hfcompress.checkpoint.atomic import MARKER
from hfcompress.evaluate import Measurement
from hfcompress.publish.licence import license_of
from hfcompress.publish.sharing import local_names
from hfcompress.recipe import ModelSpec, Recipe
from hfcompress.workspace import ORIGINAL, Workspace

_OF_STAGE = ("summary", "seconds", "machine")
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
        reports.append((stage.kind if stage else ORIGINAL, facts["report"] or {}))
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
        "loads_without_hfcompress": verified is not None and not verified["with_hfcompress"],
        "verification": {"hfcompress" if verified and verified["with_hfcompress"] else "stock": verified},
        **reports_by_layer(reports),
        "layers": layers_of(folder),
    }


def reports_by_layer(reports: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return what stages reported of single layers: kept heads and neurons, and the rows of pruning and quantizing.

    Heads and neurons are (before the first stage that removed any, after the last) for each block.
    """
    structure: dict[str, dict[str, list[int]]] = {}
    rows: dict[str, Any] = {"pruning_report": None, "quantization_report": None}
    for kind, report in reports:
        for units in _KINDS_OF_UNITS:
            for block, (before, after) in report.get(units, {}).items():
                found = structure.setdefault(units, {}).setdefault(block, [before, after])
                found[1] = after
        # A training reports rows of layers only where it quantized them.
        if kind in ("quantize", "finetune", "distill") and "rows" in report:
            rows["quantization_report"] = report["rows"]
        elif kind == "prune":
            rows["pruning_report"] = report["rows"]
    return {"structure": structure or None, **rows}


def layers_of(folder: Path) -> list[dict[str, Any]]:
    """Return name, parameters, non-zeros and bytes of each layer of a checkpoint, counted from its tensors."""
    layers = inspect_checkpoint(folder).layers
    return [{"name": one.name, "parameters": one.parameters, "nonzero": one.nonzero, "bytes": one.bytes}
            for one in layers]  # fmt: skip


def base_model(spec: ModelSpec) -> dict[str, str | None]:
    """Return the name and the licence of the model that a run began with."""
    if is_packaged(spec.id):
        packaged = packaged_model(spec.id)
        return {"base_model": packaged.hub_id, "base_model_license": packaged.license}
    return {"base_model": spec.id, "base_model_license": license_of(spec.id, spec.revision)}


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
