"""Turns what is wrong with a recipe into messages: the place, the line, the value, and the nearest right name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from hfcompress.errors import RecipeError

T = TypeVar("T")
Path = tuple[Any, ...]
GIVEN_BY_OVERRIDE = 0  # stands in a table of lines for "this did not come from the file"

_WORDS: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_WORDS |= {list: "a list", tuple: "a list", dict: "a mapping"}
_ITEMS = {str: "text", int: "whole numbers", float: "numbers"}
_LIMITS = {
    "greater_than": "must be greater than {gt}, not {value}",
    "greater_than_equal": "must be at least {ge}, not {value}",
    "less_than": "must be less than {lt}, not {value}",
    "less_than_equal": "must be at most {le}, not {value}",
    "multiple_of": "must be a multiple of {multiple_of}, not {value}",
    "finite_number": "must be a finite number, not {value}",
    "too_short": "must have at least {min_length} in it",
    "too_long": "must have at most {max_length} in it",
    "string_too_short": "must have at least {min_length} letters, not {value}",
    "string_too_long": "must have at most {max_length} letters, not {value}",
    "string_pattern_mismatch": "{value} does not match the pattern {pattern}",
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that is wrong; ``line_of`` is the path whose line is named, where it is not ``path`` itself."""

    path: Path
    text: str
    line_of: Path | None = None


def fault_error(text: str, kind: str = "fault") -> PydanticCustomError:
    """Return an error that a validator raises to have ``text`` printed as it is."""
    return PydanticCustomError(kind, "{text}", {"text": text})


def recipe_error(source: str, faults: Iterable[Fault], lines: Mapping[Path, int]) -> RecipeError:
    """Return the error that lists every fault in the order of the file."""
    found = list(dict.fromkeys(faults))
    numbers = [_line(fault.line_of or fault.path, lines) for fault in found]
    rows = []
    for number, fault in sorted(zip(numbers, found), key=lambda pair: -1 if pair[0] is None else pair[0]):
        where = [] if number is None else ["override" if number == GIVEN_BY_OVERRIDE else f"line {number}"]
        where += [place(fault.path)] if fault.path else []
        rows.append(f"  {', '.join(where)}: {fault.text}" if where else f"  {fault.text}")
    count = "1 fault" if len(rows) == 1 else f"{len(rows)} faults"
    return RecipeError("\n".join([f"{source} has {count}:", *rows]))


def place(path: Path) -> str:
    """Write ``("stages", 1, "quantize", "bits")`` as ``stages[1].quantize.bits``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _line(path: Path, lines: Mapping[Path, int]) -> int | None:
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return lines.get(())


def near(name: object, known: Iterable[object]) -> str:
    """Return ``" (right?)"`` for the nearest known name, or an empty string."""
    found = difflib.get_close_matches(str(name), [str(one) for one in known], n=1, cutoff=0.6)
    return f" ({found[0]}?)" if found else ""


def unknown_option(name: object, known: Iterable[str]) -> str:
    """Answer an unknown option with the nearest one, or with all of them when none is near."""
    names = sorted(known)
    return f"unknown option '{name}'" + (near(name, names) or f"; known: {', '.join(names)}")


def shown(value: object) -> str:
    """Write a value the way a recipe would, on one short line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = repr(value) if isinstance(value, (str, int, float)) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def not_a(expected: str, value: object) -> str:
    """Say what was expected and what was found."""
    if value is None:
        return f"must be {expected}, but is empty"
    hint = ": put it in quotes" if expected == "text" and not isinstance(value, (Mapping, list, tuple)) else ""
    return f"must be {expected}, not {shown(value)}{hint}"


def not_one_of(value: object, choices: Sequence[object]) -> str:
    """Say which values are allowed, and which of them is near."""
    hint = near(value, [one for one in choices if isinstance(one, str)]) if isinstance(value, str) else ""
    return f"{shown(value)} is not one of {', '.join(str(one) for one in choices)}{hint}"


def members(hint: Any) -> list[Any]:
    """Return the types that a hint allows, without None and without annotations."""
    if typing.get_origin(hint) is Annotated:
        return members(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [one for arg in typing.get_args(hint) for one in members(arg)]
    return [] if hint is type(None) else [hint]


def described(hint: Any) -> str:
    """Say in words what a hint allows, such as ``text or a list``."""
    words: list[str] = []
    for one in members(hint):
        if typing.get_origin(one) is Literal:
            words += [shown(choice) if isinstance(choice, bool) else str(choice) for choice in typing.get_args(one)]
        elif dataclasses.is_dataclass(one):
            words.append("a mapping of options")
        elif typing.get_origin(one) in (list, tuple) and members(typing.get_args(one)[0])[0] in _ITEMS:
            words.append(f"a list of {_ITEMS[members(typing.get_args(one)[0])[0]]}")
        else:
            words.append(_WORDS.get(typing.get_origin(one) or one, "a value of another type"))
    return " or ".join(dict.fromkeys(words))


@functools.cache
def _field_types(options: type) -> dict[str, Any]:
    return typing.get_type_hints(options, include_extras=True)


def _hint_of(hint: Any, key: Any) -> Any:
    """Return the hint of what lies under ``key``, or None where that is not known."""
    one: Any = members(hint)[0] if members(hint) else None
    if isinstance(one, type) and dataclasses.is_dataclass(one):
        return _field_types(one).get(key)
    arguments = typing.get_args(one)
    if typing.get_origin(one) is dict and len(arguments) == 2:
        return arguments[1]
    return arguments[0] if typing.get_origin(one) in (tuple, list) and arguments else None


def _locate(hint: Any, location: Path) -> tuple[Path, Any]:
    """Follow an error's location as far as it names places; past a choice of types it names those types."""
    for depth, key in enumerate(location):
        below = _hint_of(hint, key) if len(members(hint)) == 1 else None
        if below is None:
            return location[:depth], hint
        hint = below
    return location, hint


def _explain(details: ErrorDetails, hint: Any, value: object) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "value_error" and "error" in context:
        return str(context["error"])
    if kind in ("fault", "unknown_option"):
        return details["msg"]
    if len(members(hint)) == 1:
        if typing.get_origin(members(hint)[0]) is Literal:
            return not_one_of(value, typing.get_args(members(hint)[0]))
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be a finite number, not {shown(value)}"
        if context.get("min_length") == 1:
            return "must not be empty"
        if kind in _LIMITS:
            limits = {name: f"{one:.12g}" if isinstance(one, float) else one for name, one in context.items()}
            return _LIMITS[kind].format(value=shown(value), **limits)
    return not_a(described(hint), value)


def translate(error: ValidationError, hint: Any, raw: Any, more: Iterable[str] = ()) -> list[Fault]:
    """Turn pydantic's errors about ``raw`` into faults.  ``more``: names that ``hint`` itself does not list."""
    faults = []
    for details in error.errors(include_url=False):
        location, kind = details["loc"], details["type"]
        if kind == "unexpected_keyword_argument":
            parent, around = _locate(hint, location[:-1])
            owner = members(around)[0]
            known = {one.name for one in dataclasses.fields(owner)} | set(getattr(owner, "other_names", ()))
            text = unknown_option(location[-1], known | set(() if parent else more))
            faults.append(Fault(parent, text, location))
        elif kind == "missing":
            faults.append(Fault(location[:-1], f"'{location[-1]}' is missing"))
        elif kind == "unknown_option":
            faults.append(Fault(location[:-1], details["msg"], location))
        elif kind == "fault":
            faults.append(Fault(location, details["msg"]))
        else:
            path, at = _locate(hint, location)
            faults.append(Fault(path, _explain(details, at, functools.reduce(operator.getitem, path, raw))))
    return list(dict.fromkeys(faults))


def misplaced_booleans(hint: Any, raw: Any, path: Path = ()) -> list[Fault]:
    """Find true and false where a number belongs; pydantic would read them as 1 and 0."""
    allowed = members(hint)
    if isinstance(raw, bool):
        wrong = {int, float} & set(allowed) and not {bool, str} & set(allowed)
        return [Fault(path, not_a(described(hint), raw))] if wrong else []
    inner = raw.items() if isinstance(raw, Mapping) else enumerate(raw) if isinstance(raw, list) else ()
    found = []
    for key, value in inner:
        below = _hint_of(hint, key)
        if below is not None:
            found += misplaced_booleans(below, value, (*path, key))
    return found


def read_options(options: type[T], raw: Any, path: Path, faults: list[Fault], more: Iterable[str] = ()) -> T | None:
    """Build an options class from a mapping; on faults, add them to ``faults`` and return None.

    more: option names that belong beside the class's own.
    """
    if not isinstance(raw, Mapping):
        faults.append(Fault(path, not_a("a mapping of options", raw)))
        return None
    found = misplaced_booleans(options, raw)
    result = None
    try:
        result = TypeAdapter(options).validate_python(raw)
    except ValidationError as error:
        known = {fault.path for fault in found}
        found += [fault for fault in translate(error, options, raw, more) if fault.path not in known]
    for fault in found:
        line_of = None if fault.line_of is None else path + fault.line_of
        faults.append(Fault(path + fault.path, fault.text, line_of))
    return None if found else result
