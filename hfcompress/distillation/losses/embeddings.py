"""Embeddings: what the first layer gets."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from transformers import PreTrainedModel

from hfcompress.distillation.losses.base import FORBID
from hfcompress.distillation.losses.features import VectorLoss
from hfcompress.distillation.losses.layer_map import Layers
from hfcompress.distillation.losses.taps import Tap


@dataclass(frozen=True, config=FORBID)
class Embeddings(VectorLoss):
    """Distance of the tokens' embeddings (TinyBERT, arXiv 1909.10351, equation 9).

    weight, final_weight: at the first step and, on a line from there, at the last.
    layers: always ``last``; there is one.  distance: mse (a mean over the features) or cosine.
    """

    layers: Layers = "last"

    def find(self, model: PreTrainedModel) -> list[list[tuple[Tap, ...]]]:
        """Return the output of the input embeddings."""
        embeddings = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is embeddings)
        return [[(Tap(name),)]]
