"""Where an answer starts and ends in a text: extractive question answering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfcompress.outputs.base import ABSENT, Batch, Outputs, logits_in


class Spans(Outputs):
    """A start and an end for each row, each a choice among the row's tokens.

    The loss of Transformers' heads counts padding as possible answers, so that it depends on what a row is batched
    with. Here padding is left out of the softmax, of the task loss as of every comparison.
    """

    what: ClassVar[str] = "a start and an end"
    label_columns: ClassVar[tuple[str, ...]] = ("start_positions", "end_positions")
    own_loss: ClassVar[bool] = True
    ragged: ClassVar[bool] = True

    def labels(self, batch: Batch) -> Tensor:
        """Return (rows, 2): start and end."""
        return torch.stack([batch[column] for column in self.label_columns], dim=1)

    def labelled(self, batch: Batch) -> Tensor:
        """Mark what lies in the row, as Transformers' heads do."""
        labels, length = self.labels(batch), self.classes_in(batch)
        return (labels >= 0) & (labels < length)

    def logits(self, output: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return (rows, 2, tokens)."""
        both = torch.stack([logits_in(output, name) for name in ("start_logits", "end_logits")], dim=1)
        if "attention_mask" not in batch:
            return both
        return both.masked_fill(batch["attention_mask"].to(both.device)[:, None] == 0, ABSENT)

    def task_loss(self, output: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return the mean cross-entropy over all starts and ends."""
        kept = self.labelled(batch)
        return torch.nn.functional.cross_entropy(self.logits(output, batch)[kept].float(), self.labels(batch)[kept])

    def size(self, model: Any) -> int | None:
        """Return None: a row has as many classes as tokens."""
        return None

    def classes_in(self, batch: Batch) -> int:
        """Return how many tokens a row has, padding included."""
        return next(batch[name].shape[1] for name in ("input_ids", "attention_mask", "inputs_embeds") if name in batch)
