"""The commands that do one stage: what a recipe can say of it and of its methods, they take as options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import typer
import yaml
from rich.console import Console

from hfcompress.checkpoint import inspect_checkpoint
from hfcompress.errors import HFCompressError
from hfcompress.oneshot import OneShot
from hfcompress.publish import inspection_tables
from hfcompress.recipe import METHODS, STAGES, field_notes, options_beside_method
from hfcompress.recipe.faults import members, shown

# Beside the recipe's name of an option, the short one of the command line.
_SHORT = {"calibration_rows": "--rows", "calibration_length": "--length", "targets": "--target"}
_ONE_METHOD, _STAGE = "Options of the methods", "Options of the stage"
_WIDEST = 10  # what a list of choices may take of 80 columns; names of options need the rest


class _Choice(NamedTuple):
    """One option of one method.  method: None for an option of the stage itself."""

    method: str | None
    hint: Any
    default: Any
    note: str


def takes_options_of(
    kind: str, method: str, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every field of a kind of stage and of its methods.

    kind: a key of ``METHODS``.  method: the one that is meant when none is named.  The command's ``**options`` are
    those that were given, as a recipe has them, with ``method``.  without: parameters of the command to leave out.
    """
    choices = _choices(kind)
    option = typer.Option("--method", help=f"One of {', '.join(METHODS[kind])}.", metavar="NAME")
    named = [_keyword("method", Annotated[str, option], method)]
    named += [_keyword(name, _annotation(name, found, len(METHODS[kind]))) for name, found in choices.items()]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = {"method": given.pop("method")}
            for name, found in choices.items():
                value = given.pop(name)
                if value not in (None, []):
                    options[name] = _value(value, found)
            command(**given, options=options)

        every = inspect.signature(command, eval_str=True).parameters.values()
        own = [one for one in every if one.name != "options" and one.name not in without]
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        cut = next((index for index, one in enumerate(parameters) if one.default is not one.empty), len(parameters))
        parameters[cut:cut] = named
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _keyword(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _choices(kind: str) -> dict[str, list[_Choice]]:
    """Return the options by name, those of the methods first."""
    found: dict[str, list[_Choice]] = {}
    beside = {name for method in METHODS[kind].values() for name in options_beside_method(kind, method)}
    for method, options in METHODS[kind].items():
        for name, hint, default, note in _fields(options):
            found.setdefault(name, []).append(_Choice(method, hint, default, note))
    for name, hint, default, note in _fields(STAGES[kind]):
        if name in beside:
            found.setdefault(name, []).append(_Choice(None, hint, default, note))
    return found


def _fields(options: type[Any]) -> Iterator[tuple[str, Any, Any, str]]:
    hints, notes = get_type_hints(options, include_extras=True), field_notes(options)
    for one in dataclasses.fields(options):
        default = one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default
        yield one.name, hints[one.name], default, notes.get(one.name, "")


def _annotation(name: str, found: list[_Choice], methods: int) -> Any:
    """Return the annotation from which typer makes an option, which is None where it is not given."""
    kinds = _kinds(found)
    words = [_SHORT[name]] if name in _SHORT else []
    flag = f"--{name.replace('_', '-')}"
    option: dict[str, Any] = {
        "help": _help(found, methods).replace("``", ""),
        "rich_help_panel": _STAGE if found[0].method is None else _ONE_METHOD,
    }
    if kinds == {bool}:
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", **option)]
    if any(get_origin(kind) is tuple for kind in kinds):
        return Annotated[list[str] | None, typer.Option(flag, *words, metavar="TEXT", **option)]
    literals = dict.fromkeys(str(value) for kind in _in_order(found) for value in get_args(kind))
    metavar = "|".join(literals) if literals else "TEXT" if kinds == {str} else "VALUE"
    if len(metavar) > _WIDEST:
        metavar, option["help"] = "WORD", f"{option['help']} One of {', '.join(literals)}."
    return Annotated[str | None, typer.Option(flag, *words, metavar=metavar, **option)]


def _in_order(found: list[_Choice]) -> list[Any]:
    return [kind for one in found for kind in members(one.hint) if get_origin(kind) is Literal]


def _kinds(found: list[_Choice]) -> set[Any]:
    return {kind for one in found for kind in members(one.hint)}


def _help(found: list[_Choice], methods: int) -> str:
    note = next((one.note for one in found if one.note), "")
    sentence = f"{note[:1].upper()}{note[1:]}."
    defaults = {one.method: _shown_default(one.default) for one in found}
    if found[0].method is None or (len(found) == methods and len(set(defaults.values())) == 1):
        default = next(iter(defaults.values()))
        return f"{sentence} Default: {default}." if default else sentence
    return f"{sentence} Default: {', '.join(f'{method} {default}'.strip() for method, default in defaults.items())}."


def _shown_default(value: Any) -> str:
    if value is dataclasses.MISSING or value == ():
        return ""
    return "none" if value is None else value if isinstance(value, str) else shown(value)


def _value(given: Any, found: list[_Choice]) -> Any:
    """Return a value as a recipe's YAML would give it; ``none`` is null, and text that is asked for stays text."""
    items = {get_args(kind)[0] for kind in _kinds(found) if get_origin(kind) is tuple}
    if isinstance(given, list) and items and str not in items:
        return [yaml.safe_load(one) for one in given]
    if not isinstance(given, str):
        return given
    if given.lower() in ("none", "null"):
        return None
    only_text = all(kind is str or {type(one) for one in get_args(kind)} == {str} for kind in _kinds(found))
    if only_text:
        return given
    try:
        return yaml.safe_load(given)
    except yaml.YAMLError:
        return given


def one_shot_command(kind: str, method: str, about: str | None) -> typer.Typer:
    """Return the command that does one stage to a checkpoint.

    kind: a key of ``METHODS``.  method: the one that is meant when none is named.  about: the text of its help.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command(help=about)
    @takes_options_of(kind, method, without=() if kind == "quantize" else ("resume", "low_memory"))
    def command(
        model: Annotated[str, typer.Argument(help="A model id, a checkpoint folder, or package:<name>.")],
        output: Annotated[
            Path, typer.Option("--output", "-o", parser=_path, metavar="FOLDER", help="Folder for the result.")
        ],
        options: dict[str, Any],
        data: Annotated[
            str | None, typer.Option(help="To calibrate on: a file (text, jsonl, csv, parquet) or a dataset's id.")
        ] = None,
        text_column: Annotated[str, typer.Option(help="Column of the text in the data.")] = "text",
        task: Annotated[str, typer.Option(help="What the model is for.")] = "causal-lm",
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Replace a finished result, discard an unfinished one.")
        ] = False,
        resume: Annotated[bool, typer.Option("--resume", help="Go on after the layers of an unfinished run.")] = False,
        low_memory: Annotated[bool, typer.Option("--low-memory", help="Load the layers one at a time.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    ) -> None:
        asked = OneShot(kind, model, options, output, task, data, text_column, overwrite, resume, low_memory)
        try:
            report = asked.run()
        except KeyboardInterrupt:
            again = " Finished layers are kept; the same command with --resume goes on." * (kind == "quantize")
            raise HFCompressError(f"Interrupted.{again}") from None
        if as_json:
            print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
            return
        for table in inspection_tables(inspect_checkpoint(output)):
            Console().print(table)
        Console().print(f"\nModel card: {output / 'README.md'}", soft_wrap=True, highlight=False)

    return app


def _path(text: str) -> Path:
    return Path(text).expanduser()
