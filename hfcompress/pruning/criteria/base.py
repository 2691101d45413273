"""What a criterion is: scores for the weights of one module, and what must be observed before they can be given."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]


class Criterion(Protocol):
    """Maps a weight to scores of its shape, in float32; the lowest are pruned first.

    A criterion keeps nothing itself.  What it has observed of a weight lies in a ``State`` of named float32 tensors,
    which training checkpoints carry.
    """

    needs_gradient: ClassVar[bool]
    """``observe_`` is called before every optimizer step with the weight's gradient, where it has one."""
    needs_activations: ClassVar[bool]
    """``observe_`` is called at the steps that prune, with sums over what the module saw, where it ran.

    For weights they are sums of squares.
    """

    def initial(self, weight: Tensor) -> State:
        """Return the state of a weight of which nothing has been observed."""
        ...

    def observe_(self, state: State, weight: Tensor, evidence: Tensor) -> None:
        """Add evidence to the state, in place.

        evidence: the gradient, of the weight's shape and averaged over the whole batch; or, for activations,
        (inputs + 1,): the sum of squares of each input feature over the tokens, then the number of tokens.
        """
        ...

    def scores(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Return the scores of a weight, laid out (outputs, inputs) where it is a matrix."""
        ...


def no_steps(weight: Tensor) -> Tensor:
    """Return the number of steps that a moving average begins with, () float32."""
    return torch.zeros((), dtype=torch.float32, device=weight.device)


def unbiased(average: Tensor, steps: Tensor, decay: float) -> Tensor:
    """Return a moving average that began at zero without its bias to zero (Adam, arXiv 1412.6980, section 3).

    steps: (), how many values it has taken in; weights that have seen unlike numbers of steps compare by it.
    """
    return average / (1 - decay ** steps.clamp_min(1))


class OfWeightsAlone:
    """The half of a criterion that observes nothing and keeps nothing: its scores come from the weight or its name."""

    needs_gradient: ClassVar[bool] = False
    needs_activations: ClassVar[bool] = False

    def initial(self, weight: Tensor) -> State:
        """Nothing is kept."""
        return {}

    def observe_(self, state: State, weight: Tensor, evidence: Tensor) -> None:
        """Nothing is observed."""
