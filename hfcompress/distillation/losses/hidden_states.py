"""Hidden states: what a layer hands on to the next."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from transformers import PreTrainedModel

from hfcompress.distillation.losses.base import FORBID
from hfcompress.distillation.losses.features import Layered, VectorLoss, is_decoder
from hfcompress.distillation.losses.taps import Tap
from hfcompress.structure import layer_stacks


@dataclass(frozen=True, config=FORBID)
class HiddenStates(VectorLoss):
    """Distance of the layers' outputs, token by token (TinyBERT, arXiv 1909.10351, equation 8).

    weight, final_weight: at the first step and, on a line from there, at the last.
    layers: ``auto`` spreads the student's layers evenly over the teacher's, ``last`` compares the last ones, or pairs
    of a student's and a teacher's layer.  distance: mse (a mean over the features) or cosine.
    """

    def find(self, model: PreTrainedModel) -> Layered:
        """Return the output of every layer."""
        return [
            [(Tap(f"{stack.name}.{layer}", decoder=is_decoder(model, stack)),) for layer in range(len(stack))]
            for stack in layer_stacks(model)
        ]
