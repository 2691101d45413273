"""The JSON schema that editors use knows what recipes can say, and its file is current."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfcompress.recipe import (
    STAGES,
    Recipe,
    load_recipe,
    recipe_schema,
)
from hfcompress.recipe.aliases import ALIASES
from hfcompress.recipe.options import METHODS, options_beside_method
from tests.test_recipe import BUNDLED, RECIPES


def test_schema_file_is_current() -> None:
    written, made = json.loads((RECIPES / "recipe.schema.json").read_text()), recipe_schema()
    comment = written["$defs"]["training"]["$comment"]
    if comment != f"transformers {version('transformers')}":  # other versions have other fields
        written["$defs"].pop("DebugOption", None), made["$defs"].pop("DebugOption", None)
        written["$defs"].pop("training"), made["$defs"].pop("training")
    assert written == made


def resolved(schema: dict[str, Any], part: dict[str, Any]) -> list[dict[str, Any]]:
    """The object schemas that a part of a schema stands for."""
    if "$ref" in part:
        return resolved(schema, schema["$defs"][part["$ref"].removeprefix("#/$defs/")])
    choices = part.get("oneOf") or part.get("anyOf") or []
    return [one for choice in choices for one in resolved(schema, choice)] or [part]


def unknown_to_schema(schema: dict[str, Any], part: dict[str, Any], value: Any, path: str) -> list[str]:
    """The paths of keys that no alternative of the schema allows."""
    if isinstance(value, list):
        items = part.get("items", {})
        return [bad for i, one in enumerate(value) for bad in unknown_to_schema(schema, items, one, f"{path}[{i}]")]
    if not isinstance(value, dict):
        return []
    results = []
    for choice in resolved(schema, part):
        if choice.get("type", "object") != "object":
            continue
        constants = {key: rules["const"] for key, rules in choice.get("properties", {}).items() if "const" in rules}
        if any(value.get(key, constant) != constant for key, constant in constants.items()):
            continue
        allowed, bad = choice.get("properties", {}), []
        for key, one in value.items():
            if key in allowed:
                bad += unknown_to_schema(schema, allowed[key], one, f"{path}.{key}")
            elif choice.get("additionalProperties") is False:
                bad.append(f"{path}.{key}")
        bad += [f"{path}.{key} is missing" for key in choice.get("required", []) if key not in value]
        results.append(bad)
    return min(results, key=len) if results else [path]


@pytest.mark.parametrize("file", BUNDLED, ids=lambda file: file.stem)
def test_schema_knows_every_key_of_bundled_recipes(file: Path) -> None:
    schema = recipe_schema()
    for content in (yaml.safe_load(file.read_text()), load_recipe(file).to_dict()):
        assert unknown_to_schema(schema, schema, content, "") == []


def test_schema_refuses_unknown_keys() -> None:
    schema, content = recipe_schema(), load_recipe("smollm2_python_docs").to_dict()
    content["stages"][1]["distill"]["prune"]["sparsty"] = 1
    content["stages"][1]["distill"]["training"]["output_dir"] = "x"
    assert unknown_to_schema(schema, schema, content, "") == [
        ".stages[1].distill.prune.sparsty",
        ".stages[1].distill.training.output_dir",
    ]


def test_schema_has_every_option_with_a_description() -> None:
    schema = recipe_schema()
    kinds = schema["properties"]["stages"]["items"]["properties"]
    assert list(kinds) == list(STAGES)
    for kind, methods in METHODS.items():
        assert [one["properties"]["method"]["const"] for one in kinds[kind]["oneOf"]] == list(methods)
        for method, one in zip(methods.values(), kinds[kind]["oneOf"], strict=True):
            own = [field.name for field in dataclasses.fields(method)]
            assert set(one["properties"]) == {"method", *own, *options_beside_method(kind, method)}
            assert all("description" in rules for name, rules in one["properties"].items())
    assert set(schema["properties"]) == {field.name for field in dataclasses.fields(Recipe)}
    for kind, options in STAGES.items():
        if kind not in METHODS:
            assert set(kinds[kind]["properties"]) == {field.name for field in dataclasses.fields(options)}
    assert schema["$defs"]["DataSpec"]["properties"]["held_out_share"]["description"].startswith("share of the rows")
    assert set(ALIASES) < set(schema["$defs"]["DataSpec"]["properties"])
    for name in ("DataSpec", "ModelSpec", "EvaluateSpec", "Splits"):
        assert all("description" in rules for rules in schema["$defs"][name]["properties"].values())


def test_schema_refers_only_to_what_it_defines() -> None:
    text = json.dumps(recipe_schema())
    used = {part.split('"')[0] for part in text.split("#/$defs/")[1:]}
    assert used == set(recipe_schema()["$defs"])
