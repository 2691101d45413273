"""What criteria of units watch in the forwards of the steps that prune."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.pruning.criteria.base import Criterion
from hfcompress.pruning.inputs import InputSums, Watch, sum_of_squares
from hfcompress.pruning.units.attention_watch import AttentionWatch
from hfcompress.pruning.units.class_moments import class_moments, refuse_unlabelled
from hfcompress.pruning.units.criteria import UnitEntropy, UnitMutualInformation
from hfcompress.structure import AttentionSite


def unit_watch(
    criterion: Criterion,
    model: PreTrainedModel,
    weights: Mapping[str, nn.Parameter],
    features: Mapping[str, Tensor],
    attention: Mapping[str, AttentionSite],
) -> Watch:
    """Return what sums a criterion's evidence.

    features: by weight, the input columns of each unit, (units, features).  attention: by weight, the sites whose
    heads it reads.
    """
    if isinstance(criterion, UnitEntropy):
        return AttentionWatch(model, attention)

    def squares(name: str, inputs: Tensor, mask: Tensor | None, labels: Tensor | None) -> Tensor:
        found, columns = sum_of_squares(inputs, mask), features[name].to(inputs.device)
        return torch.cat([found[:-1][columns].sum(1), found[-1:]])

    def moments(name: str, inputs: Tensor, mask: Tensor | None, labels: Tensor | None) -> Tensor:
        in_order = inputs[..., features[name].flatten().to(inputs.device)]
        assert isinstance(criterion, UnitMutualInformation)
        return class_moments(in_order, mask, labels, criterion.classes)

    if isinstance(criterion, UnitMutualInformation):
        return InputSums(model, weights, moments, refuse_unlabelled)
    return InputSums(model, weights, squares)
