"""The model card: metadata that the Hub reads, and a page whose every number is in ``measurements.json``."""

from __future__ import annotations

import json
import math
import os
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hfcompress.checkpoint.atomic import list_own_files, write_text
from hfcompress.publish import sections
from hfcompress.publish.facts import Facts, load_facts
from hfcompress.publish.loading import TASK_PAGES, loading_lines, packages_to_install
from hfcompress.publish.markdown import cell
from hfcompress.publish.numbers import NOT_MEASURED, duration
from hfcompress.publish.plots import plot_size_against_quality

CARD, PICTURE = "README.md", "size_against_quality.png"
_TEMPLATE = "card.md.jinja"


def write_model_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """Write ``README.md``, and its picture, into a checkpoint folder from the folder's ``measurements.json``.

    repo_id: what the loading example names; None is the run's own output folder. Works offline. Raises CheckpointError
    or DataError when the measurements are missing or wrong.
    """
    folder = Path(folder)
    facts = load_facts(folder)
    picture = plot_size_against_quality(facts, folder / PICTURE)
    if picture is None:
        (folder / PICTURE).unlink(missing_ok=True)
    page = render_card(facts, _config(folder), picture.name if picture else None, repo_id)
    write_text(folder / CARD, page)
    list_own_files(folder, [CARD, *([PICTURE] if picture else [])])
    return folder / CARD


def render_card(facts: Facts, config: dict[str, Any], picture: str | None = None, repo_id: str | None = None) -> str:
    """Return the card's text.  config: the checkpoint's ``config.json``.  picture: its name beside the card."""
    report = sections.report(facts)
    page = _environment().from_string(_template()).render(
        name=facts.name,
        headline=sections.headline(facts),
        description=sections.description(facts),
        packages=packages_to_install(config, bool(facts.loads_without_hfcompress)),
        loading=loading_lines(facts.task, _place(facts, repo_id), bool(facts.loads_without_hfcompress)),
        loads_without_hfcompress=sections.yes_or_no(facts.loads_without_hfcompress),
        verification=sections.verification(facts),
        stage_table=sections.stages_markdown(facts),
        table_notes=sections.table_notes(facts),
        picture=picture,
        picture_metric=next(iter(facts.metric_names), ""),
        stages=[
            {"name": cell(stage.name), "summary": cell(stage.summary or NOT_MEASURED), "time": duration(stage.seconds)}
            for stage in facts.stages
        ],
        continuation=sections.continuation(facts),
        not_measured=sections.not_measured(facts),
        seed=facts.seed,
        recipe=yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True, width=100).rstrip()
        if facts.recipe
        else "",
        environment=sections.environment(facts),
        **report,
    )  # fmt: skip
    return f"---\n{metadata(facts).to_yaml()}\n---\n\n{page.strip()}\n"


def metadata(facts: Facts) -> ModelCardData:
    """Return the card's YAML head; what is not known or is no id on the Hub is left out."""
    tags = technique_tags(facts)
    page = TASK_PAGES.get(facts.task)
    dataset = _hub_id(facts.data.get("id"))
    return ModelCardData(
        base_model=_hub_id(facts.base_model),
        base_model_relation="quantized" if "quantized" in tags else "finetune",
        library_name="transformers",
        license=facts.base_model_license,
        pipeline_tag=page.pipeline_tag if page else None,
        tags=["hfcompress", *tags],
        datasets=[dataset] if dataset else None,
        metrics=list(facts.metric_names) or None,
        model_name=facts.name,
        eval_results=_eval_results(facts, page.pipeline_tag if page else facts.task, dataset) or None,
    )


def technique_tags(facts: Facts) -> list[str]:
    """Return which of pruned, distilled and quantized the recipe's stages made the model."""
    stages = [(kind, options) for stage in facts.recipe.get("stages", []) for kind, options in stage.items()]
    kinds = {kind for kind, _ in stages}
    names = ("prune", "prune_heads", "prune_neurons")
    trained = any((options or {}).get(name) for _, options in stages for name in names)
    prunes = {"prune", "drop_layers", "shrink"} & kinds or trained
    found = {"pruned": bool(prunes), "distilled": "distill" in kinds, "quantized": "quantize" in kinds}
    return [tag for tag, present in found.items() if present]


def _eval_results(facts: Facts, task_type: str, dataset: str | None) -> list[EvalResult]:
    data_name = sections.data_name(facts) or "held-out data"
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


def _hub_id(name: str | None) -> str | None:
    """Return the name if it can be a repository on the Hub, None for paths and packages."""
    if not name or name.startswith(("package:", ".", "/", "~")) or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _place(facts: Facts, repo_id: str | None) -> str:
    """Return what a reader gives to ``from_pretrained``; absolute paths mean nothing to others."""
    output = str(facts.recipe.get("output") or facts.name)
    return repo_id or (facts.name if os.path.isabs(output) or output.startswith("~") else output)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _template() -> str:
    return resources.files("hfcompress.publish").joinpath(_TEMPLATE).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    return jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
