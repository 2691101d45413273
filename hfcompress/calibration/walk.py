"""Walk through a model one layer at a time, each fed by the layers before it as they are by then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hfcompress.calibration.observe import (
    GRAM,
    LARGEST_SQUARES,
    SQUARES,
    InputHessian,
    InputSquares,
    Observed,
    Statistic,
    TokenMasks,
    observe_layer,
    refuse_non_finite,
)
from hfcompress.calibration.record import RecordedBatch, record_stack, stacks_in_order
from hfcompress.calibration.running import Batch, watching
from hfcompress.structure.stack import LayerStack, layer_stacks, linear_weights_of


@dataclass(frozen=True)
class LayerVisit:
    """One layer, with the inputs that it gets from the layers before it as they are now.

    name: the layer's full name.  After the caller changed the layer's weights it asks the walk for the next visit,
    whose inputs then come from the changed layer. Hidden states are lost when the walk goes on.
    """

    name: str
    layer: nn.Module
    index: int
    batches: Sequence[RecordedBatch]
    masks: Sequence[TokenMasks]

    @property
    def hidden_states(self) -> list[Tensor]:
        """The layer's input for each batch that reaches it, (batch, tokens, hidden)."""
        return [one.hidden for one in self.batches if self.index in one.calls and one.hidden is not None]

    def input_hessians(self, names: Sequence[str] | None = None) -> list[InputHessian]:
        """Run the layer over all batches and return what its linear layers saw, padding left out.

        names: relative to the layer; None is all.  A linear layer that saw no token is in no result. Raises ModelError
        when one saw NaN or infinite values.
        """
        return self._observe(names, GRAM)

    def input_squares(self, names: Sequence[str] | None = None) -> list[InputSquares]:
        """Return the diagonals of ``input_hessians`` for a fraction of their cost."""
        return self._observe(names, SQUARES)

    def largest_squares(self, names: Sequence[str] | None = None) -> list[InputSquares]:
        """Return the largest square of each input of the layer's linear layers, instead of their sum."""
        return self._observe(names, LARGEST_SQUARES)

    def _observe(self, names: Sequence[str] | None, statistic: Statistic[Observed]) -> list[Observed]:
        linears = linear_weights_of(self.layer)
        chosen = {name: module for name, module in linears.items() if names is None or name in names}
        found = observe_layer(self.layer, self.index, self.batches, self.masks, chosen, statistic)
        refuse_non_finite(self.name, found)
        return found

    def advance_(self) -> None:
        """Send the hidden states of all batches through the layer."""
        with watching(self.layer):
            for recorded in self.batches:
                call = recorded.calls.pop(self.index, None)
                if call is not None and recorded.hidden is not None:
                    recorded.hidden = call.run(self.layer, recorded.hidden)


def walk_layers(model: nn.Module, batches: Sequence[Batch]) -> Iterator[LayerVisit]:
    """Visit the layers of every stack in the order in which the model runs them.

    batches: keyword arguments of ``model``. In an encoder-decoder the decoder's turn comes after the encoder's, and it
    sees the encoder as it is by then. Layers that no batch reaches are visited too, without hidden states. Raises
    ModelError when the model has no stack, or one that cannot be replayed.
    """
    stacks = layer_stacks(model)
    ordered = stacks_in_order(model, stacks, batches[0]) if len(stacks) > 1 else stacks
    for stack in ordered:
        masks = [_token_masks(model, batch, is_last=stack is ordered[-1]) for batch in batches]
        yield from _walk_stack(stack, record_stack(model, stack, batches), masks)
    for stack in stacks:
        if stack not in ordered:
            yield from _walk_stack(stack, [], [])


def _walk_stack(
    stack: LayerStack, recorded: Sequence[RecordedBatch], masks: Sequence[TokenMasks]
) -> Iterator[LayerVisit]:
    for index, layer in enumerate(stack.layers):
        visit = LayerVisit(f"{stack.name}.{index}", layer, index, recorded, masks)
        yield visit
        if index + 1 < len(stack):
            visit.advance_()


def _token_masks(model: nn.Module, batch: Batch, is_last: bool) -> TokenMasks:
    """A decoder, the last stack of an encoder-decoder, counts its own tokens by the decoder's mask."""
    mask = batch.get("attention_mask")
    if is_last and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return TokenMasks(own=batch.get("decoder_attention_mask"), context=mask)
    return TokenMasks(own=mask, context=mask)
