"""Feature losses of one student and one teacher: which layers meet, and the projections between their widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.distillation.losses import FeatureLoss
from hfcompress.distillation.losses.features import at_least_float32
from hfcompress.distillation.losses.layer_map import Layers, layer_pairs
from hfcompress.distillation.losses.taps import Tap, tapped
from hfcompress.errors import ModelError
from hfcompress.structure import layer_stacks
from hfcompress.structure.inputs import dummy_inputs
from hfcompress.structure.running import watching

Stack = Sequence[tuple[Tap, ...] | None]
Counted = Callable[[Tensor, bool], Tensor]


@dataclass(frozen=True)
class Match:
    """One loss between one layer of the student and one of the teacher."""

    name: str
    loss: FeatureLoss
    student: tuple[Tap, ...]
    teacher: tuple[Tap, ...]


class FeatureMatcher:
    """Finds the pairs of layers once, holds the learned projections, and compares.

    projections: modules by name, with parameters in float32; they are no part of either model.
    Raises ModelError when a layer is not there, stacks do not correspond, or a model has no such features.
    """

    def __init__(
        self, losses: Mapping[str, FeatureLoss], student: PreTrainedModel, teacher: PreTrainedModel, seed: int
    ) -> None:
        self.losses = losses
        self.matches = [match for name, loss in losses.items() for match in _matches(name, loss, student, teacher)]
        self.student_taps = [tap for match in self.matches for tap in match.student]
        self.teacher_taps = [tap for match in self.matches for tap in match.teacher]
        self.projections = nn.ModuleDict()
        # Its own generator: a run with projections draws the same dropout and batches as one without.
        generator = torch.Generator().manual_seed(seed)
        widths = [_widths(model, taps) for model, taps in ((student, self.student_taps), (teacher, self.teacher_taps))]
        for match in self.matches:
            for place, (own, other) in enumerate(zip(match.student, match.teacher)):
                if match.loss.projected and widths[0][own] != widths[1][other]:
                    linear = nn.Linear(widths[0][own], widths[1][other], bias=False)
                    nn.init.orthogonal_(linear.weight, generator=generator)
                    self.projections[_key(match, place)] = linear.to(student.device)

    def row_losses(
        self, own: Mapping[Tap, Tensor], other: Mapping[Tap, Tensor], counted: Counted
    ) -> dict[str, Tensor]:
        """Return each loss's value for each row, (rows,), as a mean over its pairs of layers.

        counted: returns which tokens of a tensor count, given whether they are a decoder's.
        """
        found: dict[str, list[Tensor]] = {}
        for match in self.matches:
            student = tuple(self._projected(match, place, own[tap]) for place, tap in enumerate(match.student))
            teacher = tuple(other[tap].detach().to(student[0].device) for tap in match.teacher)
            if student[0].shape[:-1] != teacher[0].shape[:-1]:
                raise ModelError(
                    f"{match.name}: the student's {match.student[0].module} has rows and tokens "
                    f"{tuple(student[0].shape[:-1])}, the teacher's {match.teacher[0].module} "
                    f"{tuple(teacher[0].shape[:-1])}; they cannot be compared one by one."
                )
            losses = match.loss.rows(student, teacher, counted(student[0], match.student[0].decoder))
            found.setdefault(match.name, []).append(losses)
        return {name: torch.stack(losses).mean(0) for name, losses in found.items()}

    def _projected(self, match: Match, place: int, features: Tensor) -> Tensor:
        key = _key(match, place)
        if key not in self.projections:
            return features
        projected: Tensor = self.projections[key](at_least_float32(features))
        return projected


def _key(match: Match, place: int) -> str:
    return f"{match.name}-{match.student[place].module}".replace(".", "_")


def _matches(name: str, loss: FeatureLoss, student: PreTrainedModel, teacher: PreTrainedModel) -> list[Match]:
    own, other = loss.find(student), loss.find(teacher)
    if len(own) != len(other):
        raise ModelError(
            f"{name}: the student has {len(own)} layer stacks and the teacher {len(other)}, so it is unclear which "
            "layers to compare."
        )
    stacks = zip(own, other)
    return [Match(name, loss, *pair) for stack in stacks for pair in _pairs(name, loss.layers, *stack)]


def _pairs(name: str, layers: Layers, own: Stack, other: Stack) -> list[tuple[tuple[Tap, ...], tuple[Tap, ...]]]:
    """Return the taps of each pair of layers; what is not named is found among the layers that have any."""
    if not isinstance(layers, tuple):
        own, other = ([taps for taps in stack if taps is not None] for stack in (own, other))
    pairs = []
    for first, second in layer_pairs(layers, len(own), len(other)):
        mine, theirs = own[first], other[second]
        if mine is None or theirs is None:
            who, layer = ("student", first) if mine is None else ("teacher", second)
            raise ModelError(f"{name}: layer {layer} of the {who} has nothing to compare. Name another one.")
        pairs.append((mine, theirs))
    return pairs


def check_layers(losses: Mapping[str, FeatureLoss], student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise ModelError for layers that are not there and stacks that do not correspond.

    student, teacher: their weights are not looked at.  Of losses that find layers by running the model, pairs are
    compared with the longest stacks, since there may be layers that have no such features.
    """
    longest = [max(len(stack) for stack in layer_stacks(model)) for model in (student, teacher)]
    for name, loss in losses.items():
        if not loss.found_by_running:
            _matches(name, loss, student, teacher)
        elif isinstance(loss.layers, tuple):
            layer_pairs(loss.layers, *longest)


def _widths(model: PreTrainedModel, taps: list[Tap]) -> dict[Tap, int]:
    """Return the last dimension of what each tap gives, by running the model once."""
    with watching(model), tapped(model, taps) as found:
        model(**dummy_inputs(model))
        return {tap: found[tap].shape[-1] for tap in taps}
