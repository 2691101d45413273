"""What the example scripts of Transformers call options of the data, which a recipe takes under those names too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hfcompress.recipe.faults import Fault, Path, place

# From a name in the data section to the option that it is another name of.
ALIASES: dict[str, Path] = {
    "dataset_name": ("data", "id"),
    "dataset_config_name": ("data", "name"),
    "train_file": ("data", "files", "train"),
    "validation_file": ("data", "files", "validation"),
    "test_file": ("data", "files", "test"),
    "train_split_name": ("data", "splits", "train"),
    "validation_split_name": ("data", "splits", "held_out"),
    "eval_split_name": ("data", "splits", "held_out"),
    "text_column_name": ("data", "text_column"),
    "label_column_name": ("data", "label_column"),
    "max_seq_length": ("data", "max_length"),
    "max_train_samples": ("data", "max_train_rows"),
    "max_eval_samples": ("evaluate", "max_rows"),
}


def take_aliases_(raw: dict[str, Any], faults: list[Fault]) -> dict[Path, Path]:
    """Move what a recipe gives under other names to its place; return from which place each came, by where it is now.

    An option that is given under two names is a fault.
    """
    data = raw.get("data")
    written: dict[Path, Path] = {}
    if not isinstance(data, dict):
        return written
    for alias, target in ALIASES.items():
        value = data.pop(alias, None)
        if value is None:
            continue
        given = _put_(raw, target, value)
        if given is None:
            written[target] = ("data", alias)
        else:
            other = place(written.get(given, given))
            faults.append(Fault(("data", alias), f"means {place(target)}, but {other} is given too: take one out"))
    return written


def as_written(fault: Fault, written: Mapping[Path, Path]) -> Fault:
    """Return a fault with its place under the name that the recipe gives it.  written: see ``take_aliases_``."""
    line_of = None if fault.line_of is None else _as_written(fault.line_of, written)
    return dataclasses.replace(fault, path=_as_written(fault.path, written), line_of=line_of)


def _as_written(path: Path, written: Mapping[Path, Path]) -> Path:
    for target, alias in written.items():
        if path[: len(target)] == target:
            return alias + path[len(target) :]
    return path


def _put_(raw: dict[str, Any], path: Path, value: Any) -> Path | None:
    """Set what a path names, unless that or what it would lie in is given otherwise: then return where."""
    within: Any = raw
    for depth, key in enumerate(path[:-1], start=1):
        if within.get(key) is None:
            within[key] = {}
        within = within[key]
        if not isinstance(within, dict):
            return path[:depth]
    if within.get(path[-1]) is not None:
        return path
    within[path[-1]] = value
    return None
