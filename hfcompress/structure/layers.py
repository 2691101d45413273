"""Depth pruning: keep some layers of a stack, drop the others, and say so in the config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DropLayers:
    """Keep ``keep`` layers of the model's stack.

    select: ``even`` keeps the first and the last layer and evenly spaced ones between; ``first`` keeps the first
    ``keep`` layers; ``last`` the last ones.  layers: the indices to keep, instead of keep and select.
    """

    keep: Annotated[int, Field(ge=1)] | None = None
    select: Literal["even", "first", "last"] = "even"
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.layers is None):
            raise ValueError("give either keep (how many layers) or layers (which ones)")
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers must be distinct indices in rising order")
