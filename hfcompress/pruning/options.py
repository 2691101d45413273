"""What a gradual pruning run can be told; the fields are the recipe's options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PruneOptions:
    """Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878).

    sparsity: share of the targeted weights that are zero at the end, in [0, 1).
    start, end: shares of ``max_steps`` between which the sparsity rises.
    frequency: steps between two changes of the masks; None makes 50 changes over the ramp.
    targets, exclude: name patterns (``fnmatch``) over the modules whose weights are pruned;
    targets None means every linear and Conv1D weight inside the layer stack.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    criterion: Literal["magnitude"] = "magnitude"
    scope: Literal["global", "layer"] = "global"
    schedule: Literal["cubic", "linear"] = "cubic"
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    end: Annotated[float, Field(gt=0, le=1)] = 0.7
    frequency: Annotated[int, Field(ge=1)] | None = None
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise ValueError(f"start={self.start} must lie before end={self.end} (both are shares of the steps)")
