"""What a teacher is to the trainer: columns it reads, and answers to a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hfcompress.distillation.losses.taps import Tap
from hfcompress.distillation.losses.targets import Elsewhere, Targets, TopK
from hfcompress.outputs import Outputs


@dataclass(frozen=True)
class Answer:
    """A teacher's answer to one batch, at the places that count.

    targets: logits, (answers, classes), with ``rows`` the indices of the places that count; or a ``TopK`` or an
    ``Elsewhere`` of exactly those places.  shape: of the logits without their last dimension, None where it is not
    known.  features: what was asked for from inside the teacher.
    """

    targets: Targets | None
    rows: Tensor | None
    shape: tuple[int, ...] | None
    features: Mapping[Tap, Tensor]

    def within(self, classes: int) -> Answer:
        """Return the same for the first ``classes`` classes; logits are cut in ``part``, a chunk at a time."""
        return replace(self, targets=self.targets.within(classes)) if isinstance(self.targets, TopK) else self

    def part(self, part: slice, classes: int, like: Tensor) -> Targets:
        """Return the targets of some of the counted places, on the device and in the dtype of ``like``."""
        if isinstance(self.targets, (TopK, Elsewhere)):
            return self.targets.part(part)
        assert self.targets is not None
        assert self.rows is not None
        return self.targets.index_select(0, self.rows[part])[:, :classes].to(like.device, like.dtype)


class Teacher(ABC):
    """One source of targets; one subclass in one file each."""

    top_k: int | None = None
    classes: int | None

    @property
    @abstractmethod
    def columns(self) -> set[str]:
        """Return the names of the input columns that it reads."""

    @abstractmethod
    def answer(self, inputs: Mapping[str, Any], kind: Outputs, rows: Tensor | None, taps: Sequence[Tap]) -> Answer:
        """Answer one batch.

        kind: of the outputs.  rows: flat indices of the places that count, None where no logits are wanted.
        taps: what is wanted from inside the teacher.
        """

    def place_on(self, device: torch.device) -> None:  # noqa: B027
        """Move to the device where the student is, unless it has a place of its own."""
