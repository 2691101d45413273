"""The JSON schema of recipes, with which editors complete and check them."""

from __future__ import annotations

import dataclasses
import re
from importlib.metadata import version
from typing import Any

from pydantic import TypeAdapter

from hfcompress.distillation.losses import LOSSES
from hfcompress.pruning.oneshot import SparseGPT
from hfcompress.pruning.options import PruneOptions
from hfcompress.pruning.units.options import HeadPruneOptions, NeuronPruneOptions
from hfcompress.recipe.aliases import ALIASES, CONVERTED
from hfcompress.recipe.data import PATHS_SCHEMA, DataSpec, Splits
from hfcompress.recipe.faults import place
from hfcompress.recipe.options import METHODS, STAGES, Recipe, options_beside_method
from hfcompress.recipe.sections import Benchmark, EvaluateSpec, ModelSpec
from hfcompress.recipe.training import REFUSED, choices_of, training_types

_PRUNING = (PruneOptions, HeadPruneOptions, NeuronPruneOptions, SparseGPT)
_DESCRIBED = {one.__name__: one for one in (ModelSpec, DataSpec, Splits, EvaluateSpec, Benchmark, *_PRUNING)}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe file.

    The ``training`` part holds the fields of the installed transformers, and says of which version.
    """
    definitions: dict[str, Any] = {}
    top = _schema_of(Recipe, definitions)
    kinds = {kind: _stage_schema(kind, definitions) for kind in STAGES}
    definitions["training"] = _training_schema(definitions)
    shared = {"Stage", *(one.__name__ for one in STAGES.values())}
    methods = {one.__name__ for table in METHODS.values() for one in table.values()}
    for unused in (shared | methods) - _DESCRIBED.keys():
        definitions.pop(unused, None)
    for name, options in _DESCRIBED.items():
        _describe_(definitions[name], options)
    definitions["DataSpec"]["properties"] |= _alias_schemas(definitions)
    top["properties"]["stages"] = {
        "description": "What is done, in order; each item has one key, the kind of stage.",
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": False,
            "properties": kinds,
        },
    }
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **top,
        "title": "hfcompress recipe",
        "$defs": dict(sorted(definitions.items())),
    }
    return _without_titles(schema, keep=True)


def _schema_of(options: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an options class; the classes it refers to are added to ``definitions``."""
    schema = TypeAdapter(options).json_schema()
    definitions.update(schema.pop("$defs", {}))
    _describe_(schema, options)
    return schema


def field_notes(options: type) -> dict[str, str]:
    """Return what a class's docstring says of each field: ``field: text`` after its first line."""
    _, _, notes = (options.__doc__ or "").partition("\n")
    names = [field.name for field in dataclasses.fields(options)]
    heading = re.compile(rf"\b((?:{'|'.join(names)})(?:, (?:{'|'.join(names)}))*): ")
    parts = heading.split(" ".join(notes.split()))
    return {
        name: text.strip().rstrip(".;") for heads, text in zip(parts[1::2], parts[2::2]) for name in heads.split(", ")
    }


def _describe_(schema: dict[str, Any], options: type) -> None:
    """Take descriptions from the class's docstring."""
    schema["description"] = (options.__doc__ or "").partition("\n")[0].strip()
    for name, note in field_notes(options).items():
        schema["properties"][name]["description"] = note


def _alias_schemas(definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of each other name of an option: that of the option."""
    sections, found = {"data": "DataSpec", "splits": "Splits", "evaluate": "EvaluateSpec"}, {}
    for alias, target in ALIASES.items():
        section, option = target[-2:]
        own = PATHS_SCHEMA if section == "files" else definitions[sections[section]]["properties"][option]
        found[alias] = {**own, "description": f"another name of ``{place(target)}``"}
    described = {alias: f"another way to give ``{place(other.target)}``" for alias, other in CONVERTED.items()}
    return found | {alias: {**CONVERTED[alias].schema, "description": text} for alias, text in described.items()}


def _stage_schema(kind: str, definitions: dict[str, Any]) -> dict[str, Any]:
    schema = _schema_of(STAGES[kind], definitions)
    if kind in METHODS:
        return _method_schema(kind, schema, definitions)
    if "training" in schema["properties"]:
        schema["properties"]["training"] = {"$ref": "#/$defs/training"}
    if "losses" in schema["properties"]:
        schema["properties"]["losses"]["items"] = _loss_schema(definitions)
    return schema


def _method_schema(kind: str, own: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """One alternative per method, each with the method's own options beside ``method`` and the stage's."""
    alternatives = []
    for name, method in METHODS[kind].items():
        schema = _schema_of(method, definitions)
        properties = {"method": {"const": name, "description": schema["description"]}, **schema["properties"]}
        properties.update({option: own["properties"][option] for option in options_beside_method(kind, method)})
        required = ["method", *schema.get("required", [])]
        alternatives.append({**schema, "properties": properties, "required": required})
    return {"description": (STAGES[kind].__doc__ or "").splitlines()[0], "oneOf": alternatives}


def _loss_schema(definitions: dict[str, Any]) -> dict[str, Any]:
    """A loss is its name, or one key with its options."""
    properties = {name: _schema_of(loss, definitions) for name, loss in LOSSES.items()}
    with_options = {
        "type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False,
        "properties": properties,
    }  # fmt: skip
    return {"anyOf": [{"enum": list(LOSSES)}, with_options]}


def _training_schema(definitions: dict[str, Any]) -> dict[str, Any]:
    from transformers import TrainingArguments

    help_of = {field.name: field.metadata.get("help", "") for field in dataclasses.fields(TrainingArguments)}
    properties = {}
    for name, hint in training_types().items():
        if name in REFUSED:
            continue
        choices = choices_of(hint)
        schema: dict[str, Any] = TypeAdapter(hint).json_schema() if choices is None else {"enum": choices}
        definitions.update(schema.pop("$defs", {}))
        properties[name] = {**schema, **({"description": help_of[name]} if help_of[name] else {})}
    return {
        "description": "Fields of transformers.TrainingArguments.",
        "$comment": f"transformers {version('transformers')}",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _without_titles(schema: Any, keep: bool = False) -> Any:
    """Drop the titles that pydantic makes from names."""
    if isinstance(schema, dict):
        return {
            key: _without_titles(one)
            for key, one in schema.items()
            if keep or key != "title" or not isinstance(one, str)
        }
    return [_without_titles(one) for one in schema] if isinstance(schema, list) else schema
