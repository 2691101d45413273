"""Reads recipe text: YAML with the line of every option, and overrides such as ``stages.1.distill.steps=50``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from hfcompress.recipe.faults import GIVEN_BY_OVERRIDE, Fault, Path, place, recipe_error, shown

_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(text: str, source: str) -> tuple[Any, dict[Path, int], list[Fault]]:
    """Return the content, the line of each option, and keys that are given twice as faults.

    Raises RecipeError when the text is empty or not YAML.
    """
    lines: dict[Path, int] = {}
    faults: list[Fault] = []
    node, line, problem = None, 1, ""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _record_lines(loader, node, (), lines, faults, ())
            return loader.construct_document(node), lines, faults
        problem = "the file is empty"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = f"not valid YAML: {error.problem}"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"not valid YAML: character {chr(error.character)!r} is not allowed"
    except ValueError as error:  # such as a date with a thirteenth month
        problem = f"not valid YAML: {error}"
    except RecursionError:
        problem = "not valid YAML: nested too deeply"
    raise recipe_error(source, [Fault((), problem)], {(): line})


def _record_lines(
    loader: yaml.SafeLoader,
    node: yaml.Node,
    path: Path,
    lines: dict[Path, int],
    faults: list[Fault],
    above: tuple[yaml.Node, ...],
) -> None:
    """Walk a node; a value that comes in by a merge key keeps the line where it is written."""
    if node in above:
        raise yaml.MarkedYAMLError(problem="an alias that contains itself", problem_mark=node.start_mark)
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines.setdefault((*path, index), item.start_mark.line + 1)
            _record_lines(loader, item, (*path, index), lines, faults, above)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[Any, int] = {}
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE or not isinstance(key_node, yaml.ScalarNode):
            continue
        key, line = loader.construct_object(key_node), key_node.start_mark.line + 1
        here = (*path, key)
        if key in seen:
            text = f"'{key}' is given twice (first on line {seen[key]})"
            faults.append(Fault(path, text, here))
            lines[here] = line
        seen.setdefault(key, line)
        lines.setdefault(here, line)
        _record_lines(loader, value_node, here, lines, faults, above)
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            merged = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for one in merged:
                _record_lines(loader, one, path, lines, faults, above)


def apply_overrides_(content: Any, lines: dict[Path, int], overrides: Sequence[str]) -> list[Fault]:
    """Set options named on the command line; return what is wrong with them.  Changes content and lines in place."""
    faults = []
    for override in overrides:
        name, equals, text = override.partition("=")
        problem = None
        if not equals or not name.strip():
            problem = "needs the form path.to.option=value"
        else:
            try:
                value = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError):
                problem = f"{text!r} is not valid YAML: put it in quotes"
            else:
                dotted = re.sub(r"\[(\d+)\]", r".\1", name.strip())
                problem = _set_(content, lines, dotted.split("."), value)
        if problem:
            faults.append(Fault((), f"override '{override}': {problem}"))
    return faults


def _set_(content: Any, lines: dict[Path, int], parts: list[str], value: Any) -> str | None:
    """Set one option and return None, or say why there is no such place.  Missing mappings are made on the way."""
    holder, path = content, tuple[Any, ...]()
    made: list[tuple[Path, Any, Any]] = []
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        problem = _refusal(holder, path, part)
        if problem:
            return problem
        key: Any = int(part) if isinstance(holder, list) else part
        path = (*path, key)
        if last:
            made.append((path, holder, value))
            continue
        below = holder[key] if isinstance(holder, list) else holder.get(key)
        if below is None:
            below = {}
            made.append((path, holder, below))
        holder = below
    for made_path, where, new in made:
        where[made_path[-1]] = new
        lines[made_path] = GIVEN_BY_OVERRIDE
    for replaced in [one for one in lines if one[: len(path)] == path and one != path]:
        del lines[replaced]
    return None


def _refusal(holder: Any, path: Path, part: str) -> str | None:
    """Say why ``part`` cannot be reached inside ``holder``, or return None."""
    if isinstance(holder, list):
        if not part.isdecimal():
            return f"{place(path)} is a list: name an item by its number, not '{part}'"
        if int(part) >= len(holder):
            count = f"{len(holder)} item{'' if len(holder) == 1 else 's'}"
            return f"there is no {place((*path, int(part)))}: {place(path)} has {count}"
        return None
    if not isinstance(holder, dict):
        return f"{place(path)} is {shown(holder)} and holds no options"
    if len(path) == 2 and path[0] == "stages" and holder and part not in holder:
        return f"{place(path)} is '{next(iter(holder))}', not '{part}'"
    return None
