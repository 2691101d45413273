"""What the documentation takes from the code, so that it says what the code does: references, names, numbers.

A line ``<!-- NAME -->`` or ``<!-- NAME: ARGUMENT -->`` of a page is replaced by what ``PARTS[NAME]`` returns.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import hfcompress
from docs.measured import ROOT, card_folders, effects, gallery, measured, one_shot, quantized, table, trained
from hfcompress.cli import app
from hfcompress.commands import one_shot_command
from hfcompress.publish import load_facts
from hfcompress.publish.markdown import fenced
from hfcompress.publish.report import render_report
from hfcompress.recipe import METHODS, recipe_schema

_MARK = re.compile(r"^<!-- ([a-z_]+)(?:: (.+?))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Replace a page's marks; mkdocs calls this for each page.  Links to cards begin where the page lies."""
    up = "../" * page.file.src_uri.count("/")
    text = _MARK.sub(lambda found: PARTS[found[1]](*([found[2]] if found[2] else [])), markdown)
    return text.replace("](cards/", f"]({up}cards/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the model cards, with their pictures, as pages ``cards/NAME/index.md``, and a report of them."""
    facts = [load_facts(folder) for folder in card_folders()]
    page = render_report({one.name: one for one in facts})
    files.append(File.generated(config, "report.html", content=page))
    for folder in card_folders():
        for file in folder.iterdir():
            if file.name == "README.md":
                text = file.read_text(encoding="utf-8")
                files.append(File.generated(config, f"cards/{folder.name}/index.md", content=text))
            elif file.suffix == ".png":
                files.append(File.generated(config, f"cards/{folder.name}/{file.name}", content=file.read_bytes()))
    return files


# ---- text out of docstrings ----
def _code(text: str) -> str:
    """Turn double backticks into single ones, and keep what HTML would take for its own outside of code."""
    parts = text.replace("``", "`").split("`")
    return "`".join(part if at % 2 else part.replace("<", "&lt;") for at, part in enumerate(parts))


def _described(doc: str, names: Iterable[str]) -> tuple[str, dict[str, str], str]:
    """Split a docstring into its text, what it says of each name (``name: text``, ``one, other: text``) and raises."""
    summary, _, rest = doc.partition("\n")
    rest, _, raises = re.sub(r"(?:(?<=\.)\s+|^|\n)Raises\b", "\0", rest, count=1).partition("\0")
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True)) or "(?!)"
    parts = re.split(rf"(?<![\w`.])((?:{known})(?:, (?:{known}))*): ", rest)
    said = {name: " ".join(text.split()).rstrip(";") for heads, text in zip(parts[1::2], parts[2::2])
            for name in heads.split(", ")}  # fmt: skip
    text = "\n\n".join([summary, inspect.cleandoc(parts[0])]).strip()
    return text.replace("``", "`"), said, f"Raises{raises}".replace("``", "`") if raises else ""


# ---- the reference of Python ----
def python_reference() -> str:
    """Return every public name with its signature and docstring, by the package it lives in."""
    homes: dict[str, list[str]] = {}
    for name in hfcompress.__all__:
        homes.setdefault(hfcompress._HOME_OF[name], []).append(name)
    return "\n\n".join(
        "\n\n".join([f"## {home}", _first_line(importlib.import_module(home)), *map(_entry, names)])
        for home, names in sorted(homes.items())
    )


def _first_line(thing: Any) -> str:
    return _code((inspect.getdoc(thing) or "").partition("\n")[0])


def _entry(name: str) -> str:
    thing = getattr(hfcompress, name)
    parameters = {} if name == "HFCompressError" else dict(inspect.signature(thing).parameters)
    inherited = {"DistillationConfig", "Seq2SeqDistillationConfig"}  # 100 parameters are those of TrainingArguments
    if name in inherited:
        own = {field.name for field in dataclasses.fields(thing)} - {
            field.name for field in dataclasses.fields(thing.__mro__[1])
        }
        parameters = {key: value for key, value in parameters.items() if key in own}
    text, said, raises = _described(inspect.getdoc(thing) or "", parameters)
    lines = [f"### {name}", fenced(_signature(name, list(parameters.values()))), text]
    if said:
        lines.append(table(["argument", "meaning"], [[f"`{key}`", _code(meaning)] for key, meaning in said.items()]))
    return "\n\n".join([*lines, raises])


def _signature(name: str, parameters: Sequence[inspect.Parameter]) -> str:
    """Return a call with every argument, over several lines where it is long."""
    shown = [_parameter(one) for one in parameters]
    first = next((at for at, one in enumerate(parameters) if one.kind is one.KEYWORD_ONLY), None)
    if first is not None:
        shown.insert(first, "*")
    line = f"hfcompress.{name}({', '.join(shown)})"
    lines = "".join(f"    {one},\n" for one in shown)
    return line if len(line) < 90 else f"hfcompress.{name}(\n{lines})"


def _parameter(one: inspect.Parameter) -> str:
    stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
    if one.default is one.empty:
        return stars + one.name
    default = repr(one.default)
    return f"{one.name}={default if len(default) < 30 and '<' not in default else '...'}"


# ---- the reference of recipes ----
def recipe_reference() -> str:
    """Return every option of a recipe: what it may be, its default and what it means, from the JSON schema."""
    schema = recipe_schema()
    definitions, stages = schema["$defs"], schema["properties"]["stages"]["items"]["properties"]
    parts = ["## The file", *_section(schema, leave=("stages",))]
    for name in ("ModelSpec", "DataSpec", "EvaluateSpec"):
        parts += [f"## {_SECTIONS[name]}", *_section(definitions[name])]
    for kind, stage in stages.items():
        parts += [f"## Stage {kind}", _code(stage["description"]).rstrip(".") + "."]
        for one in stage.get("oneOf", [stage]):
            method = one["properties"].get("method", {}).get("const")
            parts += [f"### {kind}, method {method}"] if method else []
            parts += _section(one, leave=("method",), says=method is not None)
    for name, part in definitions.items():
        if name not in _SECTIONS and "properties" in part:
            parts += [f"## {name}", *_section(part)]
    return "\n\n".join(parts)


# What the page calls the sections that a recipe has by other names than their classes'.
_SECTIONS = {"ModelSpec": "model", "DataSpec": "data", "EvaluateSpec": "evaluate", "training": "training"}


def _section(schema: dict[str, Any], leave: tuple[str, ...] = (), says: bool = True) -> list[str]:
    required = schema.get("required", [])
    rows = [[f"`{name}`", _values(one), "**required**" if name in required else _default(one), _meaning(one)]
            for name, one in schema["properties"].items() if name not in leave]  # fmt: skip
    text = [_code(schema["description"]).rstrip(".") + "."] if says and schema.get("description") else []
    return [*text, *([table(["option", "values", "default", "meaning"], rows)] if rows else ["No options."])]


def _values(one: dict[str, Any]) -> str:
    """Return in words what a value may be."""
    if "enum" in one:
        return ", ".join(f"`{value}`" for value in one["enum"])
    if "const" in one:
        return f"`{one['const']}`"
    if "$ref" in one:
        name = one["$ref"].rpartition("/")[2]
        return f"[{name}](#{_SECTIONS.get(name, name).lower()})"
    if "anyOf" in one or "oneOf" in one:
        kinds = [_values(part) for part in one.get("anyOf") or one["oneOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if one.get("type") == "array":
        return f"list of {_values(one.get('items', {}))}"
    kind = one.get("type", "anything")
    kind = " or ".join(kind) if isinstance(kind, list) else kind
    signs = {
        "minimum": "from {}",
        "exclusiveMinimum": "above {}",
        "maximum": "up to {}",
        "exclusiveMaximum": "below {}",
    }
    bounds = [text.format(one[key]) for key, text in signs.items() if key in one]
    return " ".join([kind, *bounds])


def _default(one: dict[str, Any]) -> str:
    if "default" not in one or one["default"] in (None, "", [], {}):
        return ""
    return f"`{json.dumps(one['default'])}`"


def _meaning(one: dict[str, Any]) -> str:
    return _code(one.get("description", ""))


# ---- the command ----
def all_commands() -> dict[str, Any]:
    """Return the commands by name; those that hand their words on, as what they hand them to."""
    root: Any = typer.main.get_command(app)
    handed = {name: one_shot_command(name, next(iter(METHODS[name])), root.commands[name].help)
              for name in METHODS}  # fmt: skip
    return {**root.commands, **{name: typer.main.get_command(one) for name, one in handed.items()}}


def commands() -> str:
    """Return every command with its arguments and options, as the command itself has them."""
    parts = []
    for name, command in all_commands().items():
        context = command.make_context(name, [], resilient_parsing=True)
        usage = " ".join([f"hfcompress {name}", *command.collect_usage_pieces(context)])
        rows = [_option(one) for one in command.params if not getattr(one, "hidden", False)]
        parts += [f"## {name}", _code(inspect.cleandoc(command.help or "")), fenced(usage),
                  table(["argument", "meaning"], rows)]  # fmt: skip
    return "\n\n".join(parts)


def _option(one: Any) -> list[str]:
    names = ", ".join(f"`{name}`" for name in [*one.opts, *one.secondary_opts])
    shown = names if one.param_type_name == "option" else f"`{one.metavar or one.name.upper()}`"
    return [shown, _code(getattr(one, "help", None) or "")]


# ---- tables of names ----
def names_in(place: str) -> str:
    """Return a table of names and first lines of docstrings of a dict, such as ``package.module:TABLE``."""
    module, _, attribute = place.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    return table(["name", "what it is"], [[f"`{name}`", _first_line(one)] for name, one in found.items()])


def readme(heading: str) -> str:
    """Return a section of the README, without its heading."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0].partition("\nApache-2.0.")[0].strip()


PARTS: dict[str, Callable[..., str]] = {
    "python_reference": python_reference,
    "recipe_reference": recipe_reference,
    "commands": commands,
    "names_in": names_in,
    "gallery": gallery,
    "effects": effects,
    "measured": measured,
    "one_shot": one_shot,
    "quantized": quantized,
    "trained": trained,
    "readme": readme,
}
