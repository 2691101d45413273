"""The sentences and tables of a model card, each made from measured facts alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from hfcompress.evaluate import Measurement
from hfcompress.publish.facts import Facts
from hfcompress.publish.markdown import code, fenced, table
from hfcompress.publish.numbers import NOT_MEASURED, duration, megabytes, metric, percent, times
from hfcompress.publish.sharing import shared_name, shared_text
from hfcompress.publish.tables import dtype_note, speed_note, stage_cells, stage_headers

_MACHINE = {"cpu": "{}", "cores": "{} cores", "threads": "{} threads", "platform": "{}", "python": "Python {}",
            "torch": "torch {}", "transformers": "transformers {}", "hfcompress": "hfcompress {}"}  # fmt: skip


def headline(facts: Facts) -> str:
    """Say in one bold sentence how much smaller the model is and what that did to its quality."""
    before, after = facts.before, facts.after
    if before is after:
        found = [f"{name} {metric(name, after.metrics.get(name))}" for name in facts.metric_names]
        size = [] if after.bytes_on_disk is None else [f"{megabytes(after.bytes_on_disk)} on disk"]
        return f"**{'; '.join([*size, f'{after.parameters / 1e6:,.1f} M parameters', *found])}.**"
    pieces = [_change("on disk", before.bytes_on_disk, after.bytes_on_disk)]
    if before.bytes_on_disk is None or after.bytes_on_disk is None:
        pieces.append(f"{after.parameters / 1e6:,.1f} M parameters instead of {before.parameters / 1e6:,.1f} M")
    for name in facts.metric_names:
        values = metric(name, before.metrics.get(name)), metric(name, after.metrics.get(name))
        pieces.append(f"{name} {values[0]} before and {values[1]} after")
    return f"**{'; '.join(piece for piece in pieces if piece)}.**"


def _change(where: str, before: int | None, after: int | None) -> str:
    if not before or not after:
        return ""
    sizes = f"({megabytes(before)} before, {megabytes(after)} after)"
    if before == after:
        return f"As large as before {where} {sizes}"
    if before < after:
        return f"{times(after, before)} times larger {where} {sizes}"
    return f"{times(before, after)} times smaller {where} {sizes}"


def data_name(facts: Facts, held_out: bool = False) -> str:
    """Return what the recipe calls its data: an id with its configuration, or the names of the files.

    held_out: of the rows that were measured on alone, where they have files of their own.
    """
    data = facts.data
    if data.get("called"):
        return str(data["called"])
    if data.get("id"):
        return " ".join(str(part) for part in (data["id"], data.get("name")) if part)
    files = data.get("files") or []
    if isinstance(files, dict):
        own = [paths for split, paths in files.items() if split != "train"] if held_out else []
        files = [path for paths in (own or files.values()) for path in ([paths] if isinstance(paths, str) else paths)]
    return ", ".join(str(path).rpartition("/")[2] for path in ([files] if isinstance(files, str) else files))


def rows_name(facts: Facts) -> str:
    """Say which rows were measured on: those that a caller in Python gave may be any."""
    return "rows" if "command" in facts.training else "held-out rows"


def description(facts: Facts) -> str:
    """Say what the model was made from, when, and on what it was measured."""
    stages = ", ".join(code(stage.name) for stage in facts.stages[1:])
    day = f" on {facts.created}" if facts.created else ""
    made = f"Made{day} from {code(shared_name(facts.base_model))}" + (f" by {stages}" if stages else "")
    license_note = (
        "" if facts.base_model_license else " The base model's licence is not known here: look it up before use."
    )
    version = f", with hfcompress {facts.version}" if facts.version else ""
    return f"{made}{version}. {_measured_on(facts)}{license_note}"


def _measured_on(facts: Facts) -> str:
    after = facts.after
    if facts.training and not after.metrics:
        whose = " of the result" if facts.metric_names else ""
        return f"No metrics{whose} are given: {facts.training.get('evaluated', 'none were measured')}."
    tokens = f" ({after.tokens:,} tokens)" if after.tokens else ""
    data = data_name(facts, held_out=True)
    source = f"{rows_name(facts)} of {code(data)}" if data else rows_name(facts)
    reloaded = "those of the last stage were taken after reloading the checkpoint."
    if facts.training and "command" not in facts.training:
        reloaded = f"they are the Trainer's own, {facts.training.get('evaluated', 'of its last evaluation')}."
    rows = "" if after.rows is None else f"{after.rows:,} "
    return f"The metrics are of {rows}{source}{tokens}; {reloaded}"


def verification(facts: Facts) -> str:
    """Say how the reloads in fresh processes compared with the model that was saved."""
    found = []
    for name, one in facts.verification.items():
        by = "stock Transformers" if name == "stock" else name
        largest = "" if one.max_logit is None else f" where the largest logit is {one.max_logit:.3g}"
        took = "" if one.seconds is None else f", in {duration(one.seconds)}"
        found.append(f"with {by}: max logit difference {one.max_logit_difference:.3g}{largest}{took}")
    return f"verified by reloading in a fresh process {'; '.join(found)}" if found else f"reload: {NOT_MEASURED}"


def yes_or_no(value: bool | None) -> str:
    """Write a fact that is true or false, or was not measured."""
    return NOT_MEASURED if value is None else "yes" if value else "no"


def stages_markdown(facts: Facts) -> str:
    """Return the table of what was measured after each stage."""
    return table(stage_headers(facts), [stage_cells(facts, stage) for stage in facts.stages])


def table_notes(facts: Facts) -> str:
    """Explain the columns of the table of stages."""
    sparsity = f"{percent(facts.after.sparsity)} of the final model's parameters are zero."
    return (
        f"{dtype_note(facts)}. 1 MB is 10^6 bytes. Size on disk is of the weight files. tokens/s: "
        f"{speed_note(facts)}. Peak memory is the resident memory of the whole process while measuring. {sparsity}"
    )


def times_note(facts: Facts) -> str:
    """Say whose time is of a machine that is not known: it may have been busy, or another than the one measured on."""
    timed = [stage for stage in facts.stages if stage.seconds is not None]
    unknown = [stage.name for stage in timed if not stage.machine]
    if not unknown:
        return ""
    which = "the stages" if len(unknown) == len(timed) > 1 else ", ".join(unknown)
    its = "times are upper bounds" if len(unknown) > 1 else "time is an upper bound"
    return f"On which machine {which} ran was not recorded, so {'their' if len(unknown) > 1 else 'its'} {its} at best."


def continuation(facts: Facts) -> dict[str, str] | None:
    """Return the prompt and what the first and the final model wrote after it, or None when they wrote nothing."""
    if not facts.after.continuation or not facts.before.continuation:
        return None
    prompt = (facts.recipe.get("evaluate") or {}).get("prompt")
    return {
        "prompt": f" {code(prompt)}" if prompt else "",
        "before": fenced(facts.before.continuation),
        "after": fenced(facts.after.continuation),
    }


def training(facts: Facts) -> str:
    """List what the Trainer and its callbacks were told, for a model that no recipe made."""
    told = facts.training.get("options") or {}
    return "\n".join(f"- {code(name)}: {code(shared_text(str(value)))}" for name, value in told.items())


def command(facts: Facts) -> str:
    """Return the command that made the model, for others to run; empty where it was a recipe or a Trainer."""
    return shlex.join(shared_name(word) for word in facts.training.get("command") or ())


def writing(facts: Facts) -> str:
    """Say by which commands the recipe's model and data are written; empty where none is known."""
    parts: dict[str, list[str]] = {}
    for part in ("model", "data"):
        told = (facts.recipe.get(part) or {}).get("written_by")
        if told:
            parts.setdefault(shared_text(str(told)), []).append(part)
    return " and ".join(f"its {' and '.join(written)} by {code(by)}" for by, written in parts.items())


def provenance(facts: Facts) -> str:
    """Say which data, which model and which teachers from outside exactly, and how long the stages took in all."""
    lines = []
    data = data_name(facts)
    if data:
        revision = facts.data.get("revision")
        digest = facts.inputs.get("data")
        named = [f"revision {code(revision)}"] if revision else []
        named += [f"content {code(digest)}"] if digest else []
        lines.append(f"Data: {code(data)}, {', '.join(named) or f'revision {NOT_MEASURED}'}.")
    if facts.inputs.get("model"):
        lines.append(
            f"Model: {code(shared_name(facts.base_model))}, content {code(shared_name(facts.inputs['model']))}."
        )
    for name, digests in facts.inputs.items():
        if name.startswith("teacher"):
            shown = " and ".join(code(shared_name(one)) for one in digests.split())
            lines.append(f"T{name[1:]}: content {shown}.")
    spent = [stage.seconds for stage in facts.stages if stage.seconds is not None]
    if spent and facts.recipe:
        lines.append(f"The stages took {duration(sum(spent))} in all, without the measurements between them.")
    return " ".join(lines)


def not_measured(facts: Facts) -> list[str]:
    """List what the card says nothing about: gaps of each stage, then what no number here covers."""
    gaps = [
        f"{stage.name}: {', '.join(missing)}."
        for stage in facts.stages
        if (missing := _gaps(facts, stage.measurement))
    ]
    quality = "Any quality: tasks, domains and languages, bias and safety."
    if facts.metric_names:
        data = data_name(facts, held_out=True)
        known = f"{', '.join(facts.metric_names)}{f' on {code(data)}' if data else ''}"
        quality = f"Any quality other than {known}: other tasks, domains and languages, bias and safety."
    return [
        *gaps,
        quality,
        "Speed and memory on other machines, devices, batch sizes and lengths than those named here.",
    ]


def _gaps(facts: Facts, found: Measurement) -> list[str]:
    values = {
        "size on disk": found.bytes_on_disk,
        "dtype": found.dtype,
        **{name: found.metrics.get(name) for name in facts.metric_names},
        "tokens/s": found.tokens_per_second,
        "latency": found.latency,
        "peak memory": found.peak_memory_bytes,
    }
    return [name for name, value in values.items() if value is None]


def environment(facts: Facts) -> str:
    """Say on what each stage was measured, one line for each different machine, device or dtype."""
    places: dict[str, list[str]] = {}
    for stage in facts.stages:
        found = stage.measurement
        known = _machine(found.machine)
        parts = {"device": found.device, "dtype": found.dtype}
        known += [f"{part} {value}" for part, value in parts.items() if value is not None]
        place = ", ".join(known) or "a machine that was not recorded"
        places.setdefault(place, []).append(stage.name)
    if len(places) == 1:
        return f"All stages were measured on: {next(iter(places))}."
    return "\n".join(f"- {', '.join(names)}: {place}." for place, names in places.items())


def where_run(facts: Facts) -> str:
    """Say on what stages ran, where that is not what they were measured on: their times are of that."""
    places: dict[str, list[str]] = {}
    for stage in facts.stages:
        if stage.machine and _machine(stage.machine) != _machine(stage.measurement.machine):
            places.setdefault(", ".join(_machine(stage.machine)), []).append(stage.name)
    return "\n".join(
        f"- Not run on what measured it: {', '.join(names)}, on {place}." for place, names in places.items()
    )


def _machine(values: Mapping[str, Any] | None) -> list[str]:
    known = values or {}
    return [text.format(known[key]) for key, text in _MACHINE.items() if known.get(key) is not None]
