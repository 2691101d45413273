"""A token or a blank for each frame of sound: connectionist temporal classification (CTC)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfcompress.outputs.base import Batch, Outputs, every_row, logits_in


@dataclass(frozen=True)
class Frames(Outputs):
    """A token for each frame; compared frame by frame, while the task loss is one of whole rows.

    reduction: the config's ``ctc_loss_reduction``: whether the model's own loss is a sum or a mean over rows.
    count: the model's own function from numbers of samples to numbers of frames; None where each sample is a frame.
    """

    what: ClassVar[str] = "a token for each frame of sound"

    reduction: str = "mean"
    count: Callable[[Tensor], Tensor] | None = None
    own_loss: ClassVar[bool] = True

    def labels(self, batch: Batch) -> Tensor:
        """Return (rows, tokens), which are not aligned with frames."""
        return batch["labels"]

    def labelled(self, batch: Batch) -> Tensor:
        """Mark every row: the loss is that of a whole transcript."""
        return every_row(batch)

    def compared(self, batch: Batch) -> Tensor:
        """Mark (rows, frames) the frames that are not padding, by the model's own count of frames.

        Models that take no mask read sounds that end with zeros.
        """
        sound = batch["input_values"] if "input_values" in batch else batch["input_features"]
        mask = batch.get("attention_mask")
        if self.count is None:
            return torch.ones_like(sound[:, :, 0], dtype=torch.bool) if mask is None else mask.bool()
        whole = torch.full((len(sound),), sound.shape[1], device=sound.device)
        lengths = lengths_of_sounds(sound) if mask is None else mask.sum(dim=1)
        frames = torch.arange(int(self.count(whole)[0]), device=sound.device)
        return frames[None] < self.count(lengths)[:, None]

    def logits(self, output: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return (rows, frames, tokens)."""
        return logits_in(output)

    def task_loss(self, output: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return the mean over rows, whatever the config's reduction."""
        return output["loss"] / len(batch["labels"]) if self.reduction == "sum" else output["loss"]

    def size(self, model: Any) -> int | None:
        """Return the number of tokens."""
        return int(model.config.vocab_size)


def lengths_of_sounds(sounds: Tensor) -> Tensor:
    """Return (rows,) how long sounds are without the zeros at their ends.  sounds: (rows, samples, ...)."""
    places = torch.arange(1, sounds.shape[1] + 1, device=sounds.device)
    return ((sounds != 0).flatten(2).any(-1) if sounds.dim() > 2 else sounds != 0).mul(places).amax(1)
