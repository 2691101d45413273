"""Recipes: YAML that says what is done to a model, read into frozen options with all faults reported at once."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.errors import RecipeError, did_you_mean
from hfcompress.quantization import RTN
from hfcompress.recipe.aliases import as_written, take_aliases_
from hfcompress.recipe.checks import cross_faults, earlier_stage, stage_kind, stage_names
from hfcompress.recipe.data import TASK_DATA, TASKS, DataSpec, Splits
from hfcompress.recipe.faults import (
    Fault,
    near,
    not_a,
    not_one_of,
    place,
    read_options,
    recipe_error,
    shown,
)
from hfcompress.recipe.faults import Path as Place
from hfcompress.recipe.options import (
    METHODS,
    NEED_DATA,
    STAGES,
    Distill,
    Finetune,
    Prune,
    PruneVocabulary,
    Quantize,
    Recipe,
    Shrink,
    Stage,
    StageOptions,
    options_beside_method,
)
from hfcompress.recipe.schema import field_notes, recipe_schema
from hfcompress.recipe.sections import EvaluateSpec, ModelSpec
from hfcompress.recipe.text import apply_overrides_, read_yaml

if TYPE_CHECKING:
    from importlib.abc import Traversable

__all__ = [
    "METHODS",
    "STAGES",
    "TASKS",
    "TASK_DATA",
    "DataSpec",
    "Distill",
    "EvaluateSpec",
    "Finetune",
    "ModelSpec",
    "Prune",
    "PruneVocabulary",
    "Quantize",
    "Recipe",
    "Shrink",
    "Splits",
    "Stage",
    "bundled_recipes",
    "field_notes",
    "load_recipe",
    "options_beside_method",
    "parse_recipe",
    "read_method",
    "recipe_differences",
    "recipe_schema",
]

_STANDS_IN = Stage("quantize", Quantize(RTN()), "quantize")  # lets other sections be checked when stages have faults


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file, or a bundled one by its bare name.

    overrides: such as ``stages.1.distill.steps=50``; the value is YAML.
    Raises RecipeError with every fault, its place and its line.
    """
    text, source = _find(path)
    content, lines, faults = read_yaml(text, source)
    if isinstance(content, dict):
        faults += apply_overrides_(content, lines, overrides)
    return _build(content, source, lines, faults)


def parse_recipe(mapping: Any, source: str = "recipe", lines: Mapping[Place, int] | None = None) -> Recipe:
    """Build a recipe from plain values.  source and lines are what messages call the file and its line numbers.

    lines: from the path of an option, such as ``("stages", 0, "distill", "steps")``, to its line.
    """
    return _build(mapping, source, lines or {}, [])


def bundled_recipes() -> dict[str, Traversable]:
    """Return the recipes that come with the package, by name."""
    try:
        folder: Traversable = resources.files("hfcompress.recipes")
    except ModuleNotFoundError:  # a checkout that is not installed
        folder = Path(__file__).resolve().parents[2] / "recipes"
    return dict(sorted(_yaml_files(folder, ""))) if folder.is_dir() else {}


def _yaml_files(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _yaml_files(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml"), entry


def _find(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the text of a recipe and what to call it in messages."""
    source = os.fspath(path)
    file: Traversable = Path(source)
    if not file.is_file():
        known = bundled_recipes()
        name = source.removesuffix(".yaml")
        if name not in known:
            raise RecipeError(
                f"No such recipe '{source}'. {did_you_mean(name, known)}Bundled recipes: {', '.join(known)}."
            )
        file, source = known[name], f"recipes/{name}.yaml"
    try:
        return file.read_text(encoding="utf-8"), source
    except UnicodeDecodeError as error:
        raise RecipeError(f"{source} is not text in UTF-8.") from error
    except OSError as error:
        raise RecipeError(f"{source} cannot be read: {error.strerror}.") from error


def _build(content: Any, source: str, lines: Mapping[Place, int], faults: list[Fault]) -> Recipe:
    if not isinstance(content, Mapping):
        text = not_a("a mapping with name, task, model, data and stages", content)
        raise recipe_error(source, [*faults, Fault((), text)], lines)
    raw = _with_text_keys(content, (), faults)
    written = take_aliases_(raw, faults)
    stages = raw.get("stages")
    if isinstance(stages, list):
        raw["stages"] = _read_stages(stages, faults)
    recipe = read_options(Recipe, raw, (), faults)
    faults += cross_faults({**raw, "stages": stages})
    if faults or recipe is None:
        raise recipe_error(source, [as_written(fault, written) for fault in faults], lines)
    return recipe


def _with_text_keys(value: Any, path: Place, faults: list[Fault]) -> Any:
    """Copy plain values; a key that is not text is a fault and left out."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                faults.append(
                    Fault(path, f"the option name {shown(key)} must be text: put it in quotes", (*path, key))
                )
        return {key: _with_text_keys(one, (*path, key), faults) for key, one in value.items() if isinstance(key, str)}
    if isinstance(value, (list, tuple)):
        return [_with_text_keys(one, (*path, index), faults) for index, one in enumerate(value)]
    return value


def _read_stages(raw: Sequence[Any], faults: list[Fault]) -> list[Stage]:
    """Return the stages; where one has faults, a stage that stands in for it."""
    names = stage_names([stage_kind(stage) for stage in raw])
    return [_read_stage(stage, index, names, faults) or _STANDS_IN for index, stage in enumerate(raw)]


def _read_stage(raw: Any, index: int, names: Sequence[str], faults: list[Fault]) -> Stage | None:
    path: Place = ("stages", index)
    if not isinstance(raw, Mapping):
        faults.append(Fault(path, not_a("a mapping from the stage's kind to its options", raw)))
        return None
    if len(raw) != 1:
        keys = ", ".join(raw) or "none"
        faults.append(
            Fault(path, f"must have one key, the stage's kind, but has {keys} (indent options below the kind)")
        )
        return None
    kind, given = next(iter(raw.items()))
    path = (*path, kind)
    if kind not in STAGES:
        known = near(kind, STAGES) or f"; known: {', '.join(STAGES)}"
        faults.append(Fault(path[:-1], f"unknown stage '{kind}'{known}", path))
        return None
    given = {} if given is None else given
    options: StageOptions | None
    if kind in METHODS and isinstance(given, Mapping):
        options = read_method(kind, given, path, faults)
    else:
        options = read_options(STAGES[kind], given, path, faults)
    if isinstance(options, Distill):
        found = tuple(earlier_stage(one, names, index) or one for one in options.teachers)
        options = dataclasses.replace(options, teacher=found[0] if isinstance(options.teacher, str) else found)
    return None if options is None else Stage(kind, options, names[index])


def read_method(kind: str, raw: Mapping[str, Any], path: Place, faults: list[Fault]) -> StageOptions | None:
    """Read a stage whose method's options stand beside ``method`` and the stage's own.

    kind: of the stage, a key of ``METHODS``.  path: where the options stand.  On faults, add them and return None.
    """
    methods, name = METHODS[kind], raw.get("method")
    if "method" not in raw:
        faults.append(Fault(path, f"'method' is missing; known: {', '.join(methods)}"))
        return None
    if not isinstance(name, str) or name not in methods:
        faults.append(Fault((*path, "method"), not_one_of(name, list(methods))))
        return None
    beside = options_beside_method(kind, methods[name])
    useless = [option for option in NEED_DATA if option in raw and option not in beside]
    faults += [Fault((*path, option), f"method {name} {NEED_DATA[option]}: remove this") for option in useless]
    own = {option: raw[option] for option in beside if option in raw}
    rest = {option: value for option, value in raw.items() if option not in ("method", *own, *useless)}
    method = read_options(methods[name], rest, path, faults, more=("method", *beside))
    options = read_options(STAGES[kind], {"method": method or next(iter(methods.values()))(), **own}, path, faults)
    return options if method is not None and not useless else None


def recipe_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line per option that differs, such as ``stages[1].distill.steps: 60 -> 50``."""
    before, after = dict(_leaves(old, ())), dict(_leaves(new, ()))
    texts = {path: (before.get(path, "not set"), after.get(path, "not set")) for path in [*before, *after]}
    return [f"{place(path)}: {was} -> {now}" for path, (was, now) in texts.items() if was != now]


def _leaves(value: Any, path: Place) -> Iterator[tuple[Place, str]]:
    """Yield every option that holds no further options, with its value as text."""
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _leaves(one, (*path, key))
    elif isinstance(value, (list, tuple)) and any(isinstance(one, Mapping) for one in value):
        for index, one in enumerate(value):
            yield from _leaves(one, (*path, index))
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)
