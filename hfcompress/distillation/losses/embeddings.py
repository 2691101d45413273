"""Embeddings: what the first layer gets."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import nn
from transformers import PreTrainedModel

from hfcompress.distillation.losses.base import FORBID
from hfcompress.distillation.losses.features import Layered, VectorLoss
from hfcompress.distillation.losses.layer_map import Layers
from hfcompress.distillation.losses.taps import Tap, name_of
from hfcompress.errors import ModelError


@dataclass(frozen=True, config=FORBID)
class Embeddings(VectorLoss):
    """Distance of the tokens' embeddings (TinyBERT, arXiv 1909.10351, equation 9).

    weight, final_weight: at the first step and, on a line from there, at the last.
    layers: always ``last``; there is one.  distance: mse (a mean over the features) or cosine.
    """

    layers: Layers = "last"

    def find(self, model: PreTrainedModel) -> Layered:
        """Return the output of the input embeddings: of an encoder-decoder the encoder's, if it reads tokens.

        Raises ModelError for a model without any.
        """
        decoder = False
        try:
            embeddings = _own(model)
            if model.config.is_encoder_decoder and not isinstance(embeddings, nn.Embedding):  # it hears or sees
                embeddings, decoder = model.get_input_embeddings(), True
        except NotImplementedError as error:
            raise ModelError(
                f"A {type(model).__name__} has no input embeddings to compare. Use another loss."
            ) from error
        return [[(Tap(name_of(model, embeddings), decoder=decoder),)]]


def _own(model: PreTrainedModel) -> nn.Module:
    """Return the embeddings that run first: an encoder has its own, though they share their weights with others."""
    return (model.get_encoder() if model.config.is_encoder_decoder else model).get_input_embeddings()
