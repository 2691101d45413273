"""The errors a user can meet. Each says what happened, with which value, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class HFCompressError(Exception):
    """Base of every error that hfcompress raises for a user's input or machine."""


class RecipeError(HFCompressError):
    """A recipe has faults; the message lists all of them with their places."""


class DataError(HFCompressError):
    """Data is missing, empty, or does not have the named columns."""


class ModelError(HFCompressError):
    """A model cannot be found, opened or treated as asked."""


class CheckpointError(HFCompressError):
    """A checkpoint is damaged, or could not be written or verified."""


class OutputError(HFCompressError):
    """An output folder holds something that must not be overwritten."""


class MissingDependencyError(HFCompressError):
    """An optional package is not installed; the message holds the command that installs it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"Did you mean 'x'? "`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"Did you mean '{near[0]}'? " if near else ""


def look_up(table: Mapping[str, T], name: str, kind: str, error: type[HFCompressError] = HFCompressError) -> T:
    """Return ``table[name]``; a wrong name is answered with the nearest right one and the list of all."""
    if name in table:
        return table[name]
    raise error(f"Unknown {kind} '{name}'. {did_you_mean(name, table)}Known: {', '.join(sorted(table))}.")
