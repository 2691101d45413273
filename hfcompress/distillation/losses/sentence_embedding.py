"""Sentence embeddings: one vector for a whole row."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.distillation.losses.base import FORBID
from hfcompress.distillation.losses.features import Distance, Layered, VectorLoss, vector_distance
from hfcompress.distillation.losses.layer_map import Layers
from hfcompress.distillation.losses.taps import Tap, name_of
from hfcompress.outputs import Pooling
from hfcompress.outputs.vectors import pooled


@dataclass(frozen=True, config=FORBID)
class SentenceEmbedding(VectorLoss):
    """Distance of the rows' embeddings, made from the model's last hidden state, of an encoder-decoder its encoder's.

    weight, final_weight: at the first step and, on a line from there, at the last.
    layers: always ``last``; there is one.  distance: cosine, or mse (a mean over the features).
    pooling: mean over the counted tokens, or ``cls`` or ``last``, the first or the last of them.
    """

    layers: Layers = "last"
    distance: Distance = "cosine"
    pooling: Pooling = "mean"

    def find(self, model: PreTrainedModel) -> Layered:
        """Return the output of the model below its head: of an encoder-decoder its encoder's."""
        base = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        return [[(Tap(name_of(model, base)),)]]

    def rows(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], counted: Tensor) -> Tensor:
        """Return the distance of the pooled vectors."""
        own, other = (pooled(one[0], counted, self.pooling) for one in (student, teacher))
        return vector_distance(own, other, self.distance)
