"""The model card: metadata that the Hub reads, and a page whose every number is in ``measurements.json``."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hfcompress.checkpoint.atomic import list_own_files, write_text
from hfcompress.checkpoint.verify import needs_hfcompress
from hfcompress.progress import say
from hfcompress.publish import sections
from hfcompress.publish.comparison import comparison_markdown, comparison_note
from hfcompress.publish.facts import FILE_NAME, Facts, load_facts
from hfcompress.publish.layers import layers_markdown, linear_reports
from hfcompress.publish.limits import limits
from hfcompress.publish.loading import TASK_PAGES, loading_lines, packages_to_install, runs_own_code
from hfcompress.publish.markdown import cell, plain
from hfcompress.publish.numbers import NOT_MEASURED, duration
from hfcompress.publish.pictures import plot_bits, plot_kept, plot_layers
from hfcompress.publish.plots import plot_size_against_quality
from hfcompress.publish.sharing import is_absolute, shared_recipe, shared_text
from hfcompress.publish.speeds import latency_markdown, latency_note

CARD = "README.md"
EDITED = "README.edited.md"
_TEMPLATE = "card.md.jinja"
# What draws each picture of a card, by its name in the template; its file is beside the card.
PICTURES: dict[str, tuple[str, Callable[[Facts, Path], Path | None]]] = {
    "size": ("size_against_quality.png", plot_size_against_quality),
    "kept": ("kept_units.png", plot_kept),
    "layers": ("layers.png", plot_layers),
    "bits": ("bits.png", plot_bits),
}


def write_model_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """Write ``README.md``, and its pictures, into a checkpoint folder from the folder's ``measurements.json``.

    repo_id: what the loading example names; None is the run's own output folder. Works offline. Raises CheckpointError
    or DataError when the measurements are missing or wrong.
    """
    folder = Path(folder)
    facts = load_facts(folder)
    pictures: dict[str, str] = {}
    for name, (file, draw) in PICTURES.items():
        if draw(facts, folder / file) is None:
            (folder / file).unlink(missing_ok=True)
        else:
            pictures[name] = file
    write_text(folder / CARD, render_card(facts, _config(folder), pictures, repo_id))
    list_own_files(folder, [CARD, *pictures.values()])
    return folder / CARD


def keep_edited(folder: Path) -> None:
    """Put a card that is not as it was written beside where the next one goes, as ``README.edited.md``, and say so.

    Without measurements there is nothing that it could have been written from.
    """
    card = folder / CARD
    if card.is_file() and not ((folder / FILE_NAME).is_file() and is_as_written(folder)):
        card.replace(folder / EDITED)
        list_own_files(folder, [EDITED])
        say(f"{card} was edited, or written by another version: its text is in {EDITED} now")


def is_as_written(folder: Path) -> bool:
    """Tell whether a folder's card is what ``write_model_card`` writes, whichever place its example names."""
    text = (folder / CARD).read_text(encoding="utf-8")
    places: list[str | None] = [None]
    named = re.search(r"from_pretrained\((\"(?:[^\"\\]|\\.)*\")", text)
    if named:
        with suppress(ValueError):  # somebody's own string, which JSON does not read
            places.append(json.loads(named[1]))
    return any(text == render_folder(folder, place) for place in places)


def render_folder(folder: Path, repo_id: str | None = None) -> str:
    """Return the text of a folder's card, with the pictures that lie beside it."""
    pictures = {name: file for name, (file, _) in PICTURES.items() if (folder / file).is_file()}
    return render_card(load_facts(folder), _config(folder), pictures, repo_id)


def render_card(
    facts: Facts, config: dict[str, Any], pictures: dict[str, str] | None = None, repo_id: str | None = None
) -> str:
    """Return the card's text.  config: the checkpoint's ``config.json``.  pictures: files beside the card, by name."""
    verified = facts.loads_without_hfcompress
    stock = not needs_hfcompress(config) if verified is None else verified
    page = _environment().from_string(_template()).render(
        name=plain(facts.name),
        headline=sections.headline(facts),
        description=sections.description(facts),
        packages=packages_to_install(config, stock),
        loading=loading_lines(facts.task, _place(facts, repo_id), stock, runs_own_code(facts.recipe, config)),
        loads_without_hfcompress=sections.yes_or_no(verified),
        verification=sections.verification(facts),
        comparison=comparison_markdown(facts),
        comparison_note=comparison_note(facts),
        stage_table=sections.stages_markdown(facts),
        table_notes=sections.table_notes(facts),
        latency_table=latency_markdown(facts),
        latency_note=latency_note(facts),
        pictures={name: (pictures or {}).get(name) for name in PICTURES},
        picture_metric=next(iter(facts.metric_names), ""),
        stages=[
            {"name": cell(one.name), "summary": cell(shared_text(one.summary or NOT_MEASURED)),
             "time": duration(one.seconds)}
            for one in facts.stages
        ],
        times_note=sections.times_note(facts),
        continuation=sections.continuation(facts),
        layers_table=layers_markdown(facts),
        layers_count=len(facts.layers),
        reports=linear_reports(facts),
        limits=limits(facts, config),
        not_measured=sections.not_measured(facts),
        training=sections.training(facts),
        command=sections.command(facts),
        seed=facts.seed,
        writing=sections.writing(facts),
        recipe=_yaml(shared_recipe(facts.recipe)) if facts.recipe else "",
        provenance=sections.provenance(facts),
        environment=sections.environment(facts),
        where_run=sections.where_run(facts),
    )  # fmt: skip
    return f"---\n{metadata(facts).to_yaml()}\n---\n\n{page.strip()}\n"


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100).rstrip()


def metadata(facts: Facts) -> ModelCardData:
    """Return the card's YAML head; what is not known or is no id on the Hub is left out."""
    tags = technique_tags(facts)
    page = TASK_PAGES.get(facts.task)
    dataset = _hub_id(facts, facts.data.get("id"))
    datasets = [name for name in facts.training.get("datasets") or [dataset] if _hub_id(facts, name)]
    kind = next(iter(facts.training.get("tasks") or ()), page.pipeline_tag if page else None)
    base = _hub_id(facts, facts.base_model)
    return ModelCardData(
        base_model=base,
        base_model_relation=base and ("quantized" if "quantized" in tags else "finetune"),
        library_name="transformers",
        license=facts.base_model_license,
        license_name=facts.base_model_license_terms.get("license_name"),
        license_link=facts.base_model_license_terms.get("license_link"),
        pipeline_tag=kind,
        tags=list(dict.fromkeys(["hfcompress", *tags, *(facts.training.get("tags") or ())])),
        language=facts.training.get("language"),
        datasets=datasets or None,
        metrics=list(facts.metric_names) or None,
        model_name=facts.name,
        eval_results=_eval_results(facts, kind or facts.task, dataset) or None,
    )


def technique_tags(facts: Facts) -> list[str]:
    """Return which of pruned, distilled and quantized the model is, by the recipe's stages or the callbacks."""
    if facts.training:
        return list(facts.training.get("techniques") or ())
    stages = [(kind, options) for stage in facts.recipe.get("stages", []) for kind, options in stage.items()]
    kinds = {kind for kind, _ in stages}
    names = ("prune", "prune_heads", "prune_neurons")
    asked = {name for _, options in stages for name, told in (options or {}).items() if told}
    found = {
        "pruned": not {"prune", "prune_vocabulary", "drop_layers", "shrink"}.isdisjoint(kinds)
        or not asked.isdisjoint(names),
        "distilled": "distill" in kinds,
        "quantized": "quantize" in kinds or "quantize_aware" in asked,
    }
    return [tag for tag, present in found.items() if present]


def _eval_results(facts: Facts, task_type: str, dataset: str | None) -> list[EvalResult]:
    data_name = sections.data_name(facts, held_out=True) or sections.rows_name(facts)
    split = (facts.data.get("splits") or {}).get("held_out")
    return [
        EvalResult(
            task_type=task_type,
            dataset_type=dataset or "local",
            dataset_name=data_name,
            dataset_config=facts.data.get("name"),
            dataset_split=split,
            metric_type=name,
            metric_value=value,
        )
        for name, value in facts.after.metrics.items()
        if math.isfinite(value)  # the Hub keeps metadata as JSON, which knows no infinity
    ]


def _hub_id(facts: Facts, name: str | None) -> str | None:
    """Return the name if it can be a repository on the Hub, None for paths and packages."""
    if not name or name.startswith(("package:", ".", "/", "~")):
        return None
    # Facts of earlier versions do not say what was a path, so those that are one here are taken for it.
    if os.path.exists(name) if facts.local is None else name in facts.local:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _place(facts: Facts, repo_id: str | None) -> str:
    """Return what a reader gives to ``from_pretrained``; absolute paths mean nothing to others."""
    output = str(facts.recipe.get("output") or facts.training.get("output") or facts.name)
    return repo_id or (facts.name if is_absolute(output) else output)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _template() -> str:
    return resources.files("hfcompress.publish").joinpath(_TEMPLATE).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    return jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
