"""What of a run is for others: the recipe without the paths of one machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import HFValidationError, validate_repo_id

_ABSOLUTE = re.compile(r"^(?:[/~]|[A-Za-z]:[\\/])")


def is_absolute(path: Any) -> bool:
    """Whether text is a path that means something on one machine alone."""
    return isinstance(path, str) and _ABSOLUTE.match(path) is not None


def local_names(names: Iterable[Any]) -> list[str]:
    """Return those names of models and data that are paths here and now, and not ids on the Hub."""
    return [str(name) for name in names if name and (is_absolute(name) or os.path.exists(name))]


def is_cached(name: str) -> bool:
    """Whether the Hub's cache has files of a model of this name, as of every one that was opened by its id."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    return any(folder.glob("snapshots/*/*"))


def shared_name(path: str) -> str:
    """Return the last part of an absolute path, and any other text as it is."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] if is_absolute(path) else path


def shared_text(text: str) -> str:
    """Return a line of text with every absolute path in it cut down to its last part."""
    return re.sub(r"(?<!\S)(?:[/~]|[A-Za-z]:[\\/])\S*?(?=[,;]?(?:\s|$))", lambda found: shared_name(found[0]), text)


def shared(values: Any) -> Any:
    """Copy plain values, with every absolute path in them cut down to its last part."""
    if isinstance(values, dict):
        return {key: shared(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [shared(value) for value in values]
    return shared_name(values) if isinstance(values, str) and "\n" not in values else values


def shared_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe for others to run: an absolute output is left out, so that it is ``runs/<name>``."""
    kept = {key: value for key, value in recipe.items() if key != "output" or not is_absolute(value)}
    evaluation = kept.get("evaluate")
    found: dict[str, Any] = shared(kept)
    if isinstance(evaluation, dict):
        found["evaluate"] = evaluation  # a prompt may begin with a slash
    return found
