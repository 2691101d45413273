"""What gradual pruning of heads and neurons can be told; the fields are the recipe's options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from hfcompress.pruning.options import GradualOptions
from hfcompress.pruning.units.criteria import UNIT_CRITERIA


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class UnitPruneOptions(GradualOptions):
    """The options that heads and neurons share."""

    criterion: Literal["taylor", "magnitude", "activation", "mutual_information", "random"] = "taylor"
    start: Annotated[float, Field(ge=0, lt=1)] = 0.1
    normalize: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.refuse_bad_ramp(UNIT_CRITERIA)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class HeadPruneOptions(UnitPruneOptions):
    """Gradual pruning of attention heads (Michel et al., arXiv 1905.10650).

    sparsity: share of the query heads that are closed at the end, in [0, 1).
    criterion: what goes first: ``taylor`` (heads whose gate changes the loss least), ``magnitude`` (small columns of
    the output projection), ``activation`` (quiet heads), ``entropy`` (heads that attend evenly),
    ``mutual_information`` (heads that say little about the label of a classifier's example) or ``random``.
    scope: ``global`` compares all heads, ``layer`` prunes every attention alike.
    schedule: ``cubic`` or ``linear`` growth from start to end, ``oneshot`` at start, ``constant`` from the beginning.
    start, end: shares of ``max_steps`` between which the sparsity rises.
    frequency: steps between two changes; None makes 50 changes over the ramp.
    normalize: divide the scores of each attention by their norm before they are compared with others.
    exclude: name patterns (``fnmatch``) over attention modules and their layers, which keep all their heads.
    grouped: how query heads that share keys go: ``whole`` groups with their keys and values, or ``even``, one query
    head of every group of the attention at once.
    """

    criterion: Literal["taylor", "magnitude", "activation", "entropy", "mutual_information", "random"] = "taylor"  # type: ignore[assignment]
    grouped: Literal["whole", "even"] = "whole"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class NeuronPruneOptions(UnitPruneOptions):
    """Gradual pruning of feed-forward neurons (Molchanov et al., arXiv 1611.06440).

    sparsity: share of the neurons that are closed at the end, in [0, 1).
    criterion: what goes first: ``taylor`` (neurons whose gate changes the loss least), ``magnitude`` (small columns of
    the output projection), ``activation`` (quiet neurons), ``mutual_information`` (neurons that say little about the
    label of a classifier's example) or ``random``.
    scope: ``global`` compares all neurons, ``layer`` prunes every feed-forward block alike.
    schedule: ``cubic`` or ``linear`` growth from start to end, ``oneshot`` at start, ``constant`` from the beginning.
    start, end: shares of ``max_steps`` between which the sparsity rises.
    frequency: steps between two changes; None makes 50 changes over the ramp.
    normalize: divide the scores of each block by their norm before they are compared with others.
    exclude: name patterns (``fnmatch``) over blocks (their output projections) and layers, which keep all neurons.
    """
