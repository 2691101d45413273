"""What a gradual pruning run can be told; the fields are the recipe's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from hfcompress.pruning.criteria import CRITERIA, Criterion
from hfcompress.pruning.patterns import NofM, Pattern, parse_pattern


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class GradualOptions:
    """What every kind of gradual pruning can be told; what the fields mean is said where they are used."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    criterion: str = "magnitude"
    scope: Literal["global", "layer"] = "global"
    schedule: Literal["cubic", "linear", "oneshot", "constant"] = "cubic"
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    end: Annotated[float, Field(gt=0, le=1)] = 0.7
    frequency: Annotated[int, Field(ge=1)] | None = None

    def refuse_bad_ramp(self, criteria: Mapping[str, type[Criterion]]) -> None:
        """Raise ValueError for a ramp that ends before it starts, or starts before its criterion has seen anything."""
        # One-shot and constant schedules have no end.
        if self.start >= self.end and self.schedule in ("cubic", "linear"):
            raise ValueError(f"start={self.start} must lie before end={self.end} (both are shares of the steps)")
        criterion = criteria[self.criterion]
        if self.schedule == "constant" and (criterion.needs_gradient or criterion.needs_activations):
            raise ValueError(
                f"schedule='constant' prunes before the first step, when criterion='{self.criterion}' has seen "
                "nothing; use schedule='oneshot' with a later start, or criterion='magnitude'"
            )


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PruneOptions(GradualOptions):
    """Gradual pruning of weights (Zhu and Gupta, arXiv 1710.01878).

    sparsity: share of the targeted weights that are zero at the end, in [0, 1); zeros that are there stay.
    criterion: what goes first: ``magnitude`` (small weights), ``movement`` (weights that move towards zero),
    ``taylor`` (little change of the loss), ``activation`` (small weights on quiet inputs) or ``random``.
    scope: ``global`` compares all weights, ``layer`` prunes every matrix alike.
    schedule: ``cubic`` or ``linear`` growth from start to end, ``oneshot`` at start, ``constant`` from the beginning.
    start, end: shares of ``max_steps`` between which the sparsity rises.
    frequency: steps between two changes of the masks; None makes 50 changes over the ramp.
    pattern: None, N:M ("2:4" keeps 2 of every 4 weights along the inputs), AxB ("4x1", blocks of outputs by inputs)
    or "row".
    targets, exclude: name patterns (``fnmatch``) over modules, or names of module types such as ``Linear``;
    targets None means every linear and Conv1D weight inside the layer stack.
    """

    criterion: Literal["magnitude", "movement", "taylor", "activation", "random"] = "magnitude"
    pattern: str | None = None
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.refuse_bad_ramp(CRITERIA)
        pattern = self.parsed_pattern()
        if isinstance(pattern, NofM) and abs(self.sparsity - pattern.sparsity) > 1e-6:
            raise ValueError(
                f"pattern='{self.pattern}' sets {pattern.group - pattern.kept} of every {pattern.group} weights to "
                f"zero; give sparsity={pattern.sparsity:.6g} with it, not {self.sparsity}"
            )

    def parsed_pattern(self) -> Pattern | None:
        """Return the pattern that the text means."""
        return None if self.pattern is None else parse_pattern(self.pattern)
