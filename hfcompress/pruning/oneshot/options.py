"""The options that every one-shot method has."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from hfcompress.pruning.patterns import NofM, parse_pattern

FORBID_UNKNOWN = ConfigDict(extra="forbid")
Sparsity = Annotated[float, Field(ge=0, lt=1)]


def group_pattern(pattern: str | None) -> NofM | None:
    """Return the pattern that "N:M" names; None is unstructured.  Raises ValueError for anything else."""
    if pattern is None:
        return None
    parsed = parse_pattern(pattern)
    if not isinstance(parsed, NofM):
        raise ValueError(f"pattern '{pattern}' is no N:M such as '2:4'; one-shot methods know no other")
    return parsed


def check_pattern(sparsity: float, pattern: str | None) -> None:
    """Raise ValueError for a pattern that is none, or that sets another share of the weights to zero than asked."""
    parsed = group_pattern(pattern)
    if parsed is not None and abs(parsed.sparsity - sparsity) > 1e-6:
        raise ValueError(
            f"pattern '{pattern}' keeps {parsed.kept} of every {parsed.group} weights, which is "
            f"sparsity={parsed.sparsity:g}, not {sparsity:g}"
        )
