"""A vector for each row: sentence embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hfcompress.outputs.base import Batch, Outputs, Values, every_row, logits_in

Pooling = Literal["mean", "cls", "last"]


@dataclass(frozen=True)
class Vectors(Outputs):
    """The pooled last hidden state of each row; there are no labels and no task loss.

    pooling: the mean over the row's tokens, or the first or the last one that is not padding.
    """

    what: ClassVar[str] = "a vector"

    pooling: Pooling = "mean"
    values: ClassVar[Values] = "vectors"
    label_columns: ClassVar[tuple[str, ...]] = ()
    own_loss: ClassVar[bool] = True

    def labels(self, batch: Batch) -> Tensor:
        """Return (rows,): nothing is labelled, and every row counts."""
        return every_row(batch).long()

    def logits(self, output: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return (rows, hidden)."""
        hidden = logits_in(output, "last_hidden_state")
        mask = batch.get("attention_mask")
        return pooled(hidden, torch.ones_like(hidden[..., 0]) if mask is None else mask, self.pooling)

    def task_loss(self, output: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return 0: without labels there is nothing to learn but from a teacher."""
        return output["last_hidden_state"].new_zeros(())

    def size(self, model: Any) -> int | None:
        """Return the length of a vector."""
        return int(model.config.get_text_config().hidden_size)


def pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Return one vector for each row.  hidden: (rows, tokens, hidden).  mask: (rows, tokens), 0 for padding.

    Means are in float32 or better.
    """
    real = mask.to(hidden.device).bool()
    if pooling == "mean":
        exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return torch.where(real[..., None], exact, 0).sum(1) / real.sum(1, keepdim=True).clamp_min(1)
    places = torch.arange(real.shape[1], device=real.device)
    place = real.int().argmax(1) if pooling == "cls" else torch.where(real, places, -1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), place]
