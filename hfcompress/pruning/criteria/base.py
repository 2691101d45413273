"""What a criterion is: scores for the weights of one module, and what must be observed before they can be given."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

State = dict[str, Tensor]


class Criterion(Protocol):
    """Maps a weight to scores of its shape, in float32; the lowest are pruned first.

    A criterion keeps nothing itself.  What it has observed of a weight lies in a ``State`` of named float32 tensors,
    which training checkpoints carry.
    """

    needs_gradient: ClassVar[bool]
    """``observe_`` is called before every optimizer step with the weight's gradient."""
    needs_activations: ClassVar[bool]
    """``observe_`` is called at the steps that prune, with sums over what the module saw: of squares, for weights."""

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


class OfWeightsAlone:
    """The half of a criterion that observes nothing and keeps nothing: its scores come from the weight or its name."""

    needs_gradient: ClassVar[bool] = False
    needs_activations: ClassVar[bool] = False

    def initial(self, weight: Tensor) -> State:
        """Nothing is kept."""
        return {}

    def observe_(self, state: State, weight: Tensor, evidence: Tensor) -> None:
        """Nothing is observed."""
