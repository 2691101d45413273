"""Mutual information: units whose activation says little about the label go first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy
import torch
from torch import Tensor

from hfcompress.pruning.criteria.base import State

NODES = 32


@dataclass(frozen=True)
class UnitMutualInformation:
    """Score a unit by the mutual information of its activation and the label, in nats.

    The activation within each class is taken as normal (a mixture over all classes), whose moments are summed in the
    steps that prune; older ones count less.  A head has several features and is worth what the best of them says,
    since it says at least that much.  An example is a row of the batch, by its mean over tokens, or a labelled token.
    """

    needs_gradient: ClassVar[bool] = False
    needs_activations: ClassVar[bool] = True
    classes: int = 2
    decay: float = 0.9

    def initial(self, weight: Tensor) -> State:
        """Start from no example; weight: (units, features, outputs)."""
        features = weight.shape[0] * weight.shape[1]
        return {"moments": torch.zeros(self.classes, 1 + 2 * features, device=weight.device)}

    def observe_(self, state: State, weight: Tensor, evidence: Tensor) -> None:
        """Add the moments of one step; evidence: (classes, 1 + 2 x features), features unit by unit."""
        state["moments"].mul_(self.decay).add_(evidence)

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return each unit's best feature's information."""
        moments = state["moments"].double().cpu()
        sums, squares = moments[:, 1:].chunk(2, dim=1)
        information = mixture_information(*moments_within(moments[:, 0], sums, squares))
        return information.reshape(weight.shape[:2]).amax(1).float().to(weight.device)


def moments_within(counts: Tensor, sums: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the share of each class, (classes,), and the mean and variance of each feature in it.

    counts: (classes,).  sums, squares: (classes, features).  Classes without examples are left out.  Each class has
    one more observation of the variance over all classes, so that few examples do not seem to be all alike.
    """
    seen = counts > 0
    counts, sums, squares = counts[seen, None], sums[seen], squares[seen]
    total = counts.sum()
    overall = (squares.sum(0) / total - (sums.sum(0) / total).square()).clamp_min(1e-30)
    means = sums / counts
    within = (squares / counts - means.square()).clamp_min(0)
    return counts.flatten() / total, means, (counts * within + overall) / (counts + 1)


def mixture_information(shares: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Return the mutual information of class and value for normal values in each class, (features,) in nats.

    shares: (classes,), adding up to 1.  means, variances: (classes, features).  Each class's expectation of its
    log-likelihood ratio is taken by Gauss-Hermite quadrature.
    """
    places, weights = (torch.from_numpy(one).to(means.dtype) for one in numpy.polynomial.hermite.hermgauss(NODES))
    total = torch.zeros_like(means[0])
    for share, mean, variance in zip(shares, means, variances):
        values = mean + (2 * variance).sqrt() * places[:, None]
        distances = (values[:, None] - means).square() / variances  # (nodes, classes, features)
        mixed = (shares.log()[:, None] - (distances + variances.log()) / 2).logsumexp(1)
        own = -places.square()[:, None] - variance.log() / 2
        total += share * (weights[:, None] * (own - mixed)).sum(0) / math.sqrt(math.pi)
    return total.clamp_min(0)
