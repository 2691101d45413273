"""Feed-forward blocks: what they add to the hidden states."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass
from transformers import PreTrainedModel

from hfcompress.distillation.losses.base import FORBID
from hfcompress.distillation.losses.features import Layered, VectorLoss, is_decoder, stacks_by_layer
from hfcompress.distillation.losses.taps import Tap
from hfcompress.structure import find_ffn


@dataclass(frozen=True, config=FORBID)
class FeedForward(VectorLoss):
    """Distance of the feed-forward blocks' outputs, token by token.

    weight, final_weight: at the first step and, on a line from there, at the last.
    layers: ``auto`` spreads the student's layers evenly over the teacher's, ``last`` compares the last ones, or pairs
    of a student's and a teacher's layer.  distance: mse (a mean over the features) or cosine.
    """

    found_by_running: ClassVar[bool] = True

    def find(self, model: PreTrainedModel) -> Layered:
        """Return the output of every layer's feed-forward block."""
        return stacks_by_layer(
            model,
            {site.layer: (Tap(site.down.name, decoder=is_decoder(model, site.layer[0])),) for site in find_ffn(model)},
        )
