"""The measured facts of a checkpoint, read from its ``measurements.json``; cards and plots show nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfcompress.errors import CheckpointError, DataError
from hfcompress.evaluate import Measurement

FILE_NAME = "measurements.json"
_NUMBER, _OBJECT = (int, float), (dict,)
_ABSENT = type(None)  # null and a field that is not there both say that it is not known
_KINDS: dict[str, tuple[type, ...]] = {
    "hfcompress": (str, _ABSENT), "name": (str,), "task": (str,), "created": (str, _ABSENT), "base_model": (str,),
    "base_model_license": (str, _ABSENT), "data": (dict, _ABSENT), "recipe": (dict, _ABSENT), "seed": (int, _ABSENT),
    "stages": (list,), "loads_without_hfcompress": (bool, _ABSENT), "verification": (dict, _ABSENT),
    "quantization_report": (list, dict, _ABSENT), "pruning_report": (list, _ABSENT), "structure": (dict, _ABSENT),
    "layers": (list, _ABSENT), "inputs": (dict, _ABSENT), "training": (dict, _ABSENT), "tuning": (dict, _ABSENT),
    "local": (list, _ABSENT), "weights": (str, _ABSENT), "base_model_license_terms": (dict, _ABSENT),
}  # fmt: skip


@dataclass(frozen=True)
class StageFacts:
    """One stage: what it did, how many seconds it took and what was measured after it; None is what is not known.

    machine: what the stage itself ran on; the measurement has its own.
    """

    name: str
    summary: str | None
    seconds: float | None
    measurement: Measurement
    machine: dict[str, Any] | None = None


@dataclass(frozen=True)
class Verification:
    """One reload in a fresh process: how far its logits were from the saved model's, and the largest one."""

    max_logit_difference: float
    max_logit: float | None
    seconds: float | None


@dataclass(frozen=True)
class Facts:
    """Everything a model card may say. The last stage was measured on the reloaded checkpoint in a fresh process.

    verification: by what the checkpoint was loaded with, ``stock`` among them.  quantization_report, pruning_report: a
    row per linear layer; of pruning with its stage.  tuning: what gradient steps on quantized scales did, as
    ``ScaleTuning`` has it.  structure: kind of unit (heads, neurons) to block to (before, after).  layers: name,
    parameters, nonzero and bytes of each.  inputs: digests of model and data.  training: of a model that no recipe
    made, what its Trainer and callbacks were told, or the words of the command, which are none where calls in Python
    made it.  local: which names of model and data are none of the Hub's: paths where it was made, or that have gone
    since, and the class of a model that came from nowhere.  weights: a digest of the files that were measured.  None
    is what is not known.
    """

    version: str | None
    name: str
    task: str
    created: str | None
    base_model: str
    base_model_license: str | None
    base_model_license_terms: dict[str, str]
    data: dict[str, Any]
    recipe: dict[str, Any]
    seed: int | None
    stages: tuple[StageFacts, ...]
    loads_without_hfcompress: bool | None
    verification: dict[str, Verification]
    quantization_report: tuple[dict[str, Any], ...]
    tuning: dict[str, Any]
    pruning_report: tuple[dict[str, Any], ...]
    structure: dict[str, dict[str, list[int]]]
    layers: tuple[dict[str, Any], ...]
    inputs: dict[str, str]
    training: dict[str, Any]
    local: tuple[str, ...] | None
    weights: str | None

    @property
    def before_stage(self) -> StageFacts:
        """The first model that could do the task: a new head's random answers are not measured."""
        return next((stage for stage in self.stages if stage.measurement.metrics), self.stages[0])

    @property
    def before(self) -> Measurement:
        """The measurement of the first model that could do the task."""
        return self.before_stage.measurement

    @property
    def after(self) -> Measurement:
        """The measurement of the final checkpoint."""
        return self.stages[-1].measurement

    @property
    def pruning_reports(self) -> dict[str, tuple[dict[str, Any], ...]]:
        """The rows of each stage that pruned, by its name; by an empty one where there is only one such stage."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.pruning_report:
            found.setdefault(row.get("stage", ""), []).append(row)
        return {name if len(found) > 1 else "": tuple(rows) for name, rows in found.items()}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics of any stage, in the order of their first appearance."""
        return tuple(dict.fromkeys(name for stage in self.stages for name in stage.measurement.metrics))


def load_facts(folder: str | Path) -> Facts:
    """Read and check a checkpoint folder's ``measurements.json``.

    Raises CheckpointError when there is no such file, DataError that lists all faults of a wrong one.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {FILE_NAME}, so nothing is known about its quality. `hfcompress run` writes it, with "
            "what was measured at each stage; for a checkpoint that calls in Python made, "
            "`hfcompress.write_model_card(folder, base_model=...)` does."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error
    return facts_from(values, str(path))


def facts_from(values: Any, where: str = FILE_NAME) -> Facts:
    """Build checked facts from the plain values of ``measurements.json``; raises DataError that lists all faults."""
    if not isinstance(values, dict):
        raise DataError(f"{where} holds a {type(values).__name__}, not a mapping.")
    faults = _faults(values, _KINDS)
    stages: list[StageFacts] = []
    if not faults:
        for index, stage in enumerate(values["stages"]):
            try:
                stages.append(_stage(stage))
            except (DataError, TypeError) as error:
                faults.append(f"stages[{index}]: {error}")
        for name, found in _verified(values).items():
            if not isinstance(found, dict) or not isinstance(found.get("max_logit_difference"), _NUMBER):
                faults.append(f"verification.{name}: needs max_logit_difference, a number")
        if not values["stages"]:
            faults.append("stages: is empty")
    if faults:
        raise DataError(f"{where} has {len(faults)} fault{'s' * (len(faults) > 1)}: {'; '.join(faults)}.")
    report = values.get("quantization_report") or []
    return Facts(
        version=values.get("hfcompress"),
        name=values["name"],
        task=values["task"],
        created=values.get("created"),
        base_model=values["base_model"],
        base_model_license=values.get("base_model_license"),
        base_model_license_terms=values.get("base_model_license_terms") or {},
        data=values.get("data") or {},
        recipe=values.get("recipe") or {},
        seed=values.get("seed"),
        stages=tuple(stages),
        loads_without_hfcompress=values.get("loads_without_hfcompress"),
        verification={
            name: Verification(found["max_logit_difference"], found.get("max_logit"), found.get("seconds"))
            for name, found in _verified(values).items()
        },
        quantization_report=tuple(report["rows"] if isinstance(report, dict) else report),
        tuning=values.get("tuning") or {},
        pruning_report=tuple(values.get("pruning_report") or ()),
        structure=values.get("structure") or {},
        layers=tuple(values.get("layers") or ()),
        inputs=values.get("inputs") or {},
        training=values.get("training") or {},
        local=None if values.get("local") is None else tuple(values["local"]),
        weights=values.get("weights"),
    )


def _verified(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reloads that took place; null stands for one that did not."""
    return {name: found for name, found in (values.get("verification") or {}).items() if found is not None}


def _faults(values: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> list[str]:
    faults = []
    for name, allowed in kinds.items():
        if name not in values:
            faults += [] if _ABSENT in allowed else [f"{name}: is missing"]
        elif not isinstance(values[name], allowed) or (isinstance(values[name], bool) and bool not in allowed):
            kind = " or ".join("null" if one is _ABSENT else one.__name__ for one in allowed)
            faults.append(f"{name}: is a {type(values[name]).__name__}, not {kind}")
    return faults


_STAGE_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,), "summary": (str, _ABSENT), "seconds": (*_NUMBER, _ABSENT), "measurement": _OBJECT,
    "machine": (dict, _ABSENT),
}  # fmt: skip
_COUNT, _TEXT = (int, _ABSENT), (str, _ABSENT)
_MEASUREMENT_KINDS: dict[str, tuple[type, ...]] = {
    "parameters": (int,), "nonzero": (int,), "metrics": _OBJECT, "bytes_on_disk": _COUNT,
    "tokens_per_second": (*_NUMBER, _ABSENT), "speed_kind": _TEXT, "peak_memory_bytes": _COUNT, "continuation": _TEXT,
    "dtype": _TEXT, "stored_dtypes": (list, _ABSENT), "device": _TEXT, "machine": (dict, _ABSENT), "rows": _COUNT,
    "tokens": _COUNT, "latency": (dict, _ABSENT), "correct": (dict, str, _ABSENT),
}  # fmt: skip


def _stage(values: Any) -> StageFacts:
    if not isinstance(values, dict):
        raise DataError(f"is a {type(values).__name__}, not a mapping")
    faults = _faults(values, _STAGE_KINDS)
    if not faults:
        faults = [f"measurement.{fault}" for fault in _faults(values["measurement"], _MEASUREMENT_KINDS)]
    if faults:
        raise DataError(", ".join(faults))
    return StageFacts(
        values["name"],
        values.get("summary"),
        values.get("seconds"),
        Measurement.from_dict(values["measurement"]),
        values.get("machine"),
    )
