"""Walk through a model one layer at a time, each fed by the layers before it as they are by then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfcompress.calibration.experts import in_portions, with_lent_tokens
from hfcompress.calibration.joined import Ground, JoinedPass
from hfcompress.calibration.observe import (
    GRAM,
    LARGEST_SQUARES,
    InputHessian,
    InputSquares,
    Observed,
    Statistic,
    TokenMasks,
    observe_layer,
    real_tokens,
    refuse_non_finite,
)
from hfcompress.calibration.parts import RowCall, by_parts, row_parts
from hfcompress.calibration.record import HIDDEN, LayerCall, RecordedBatch, hidden_of, record_stack, stacks_in_order
from hfcompress.calibration.running import Batch, watching
from hfcompress.calibration.sites import call_order
from hfcompress.calibration.together import first_rows, fits_joined, join_calls, join_masks
from hfcompress.devices import give_back_holes
from hfcompress.packed import unpacked
from hfcompress.packed.experts import split_experts
from hfcompress.structure.offload import bring_in_
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
        return [hidden for hidden, _, _ in self._reached()]

    def rows(self, index: int, states: Tensor) -> Tensor:
        """Return states inside the layer as (tokens, size) rows of one of the batches that reach it, padding dropped.

        states: (batch, tokens, ..., size).  Encoder states that a decoder's layer gets count by the encoder's mask.
        """
        _, call, masks = self._reached()[index]
        context = states.data_ptr() in call.context_pointers()
        return real_tokens(states, masks.context if context else masks.own)

    def output(self, index: int, hidden: Tensor | None = None) -> Tensor:
        """Run the layer as it is on one of the batches that reach it, for other hidden states if they are given."""
        own, call, _ = self._reached()[index]
        return call.run(self.layer, own if hidden is None else hidden)

    def parts(self, index: int, tokens: int) -> list[slice]:
        """Return rows of a batch that the layer can run on alone, about so many tokens each; all where it cannot."""
        own = self._reached()[index][0]
        return [slice(0, len(own))] if self._row_call(index) is None else row_parts(own, tokens)

    def part_output(self, index: int, rows: slice) -> Tensor:
        """Run the layer as it is on one of a batch's ``parts``, with gradients where they are wanted; (tokens, size).

        Padding is dropped.
        """
        call = self._row_call(index)
        output = self.output(index) if call is None else hidden_of(call.run(self.layer, rows))
        return self._real_part(index, rows, output)

    def part_of(self, index: int, rows: slice, states: Tensor) -> Tensor:
        """Return what is one of a batch's ``parts`` of the layer's output, (tokens, size), padding dropped."""
        return self._real_part(index, rows, states[rows])

    def _real_part(self, index: int, rows: slice, states: Tensor) -> Tensor:
        masks = self._reached()[index][2]
        whole = len(states) == len(self._reached()[index][0])
        return real_tokens(states, (masks if whole else masks.of_rows(rows.start, len(states))).own)

    def _row_call(self, index: int) -> RowCall | None:
        """Return a batch's call, or None where its rows cannot be told apart."""
        own, call, _ = self._reached()[index]
        if not call.by_keyword:
            return RowCall.of((own, *call.args), call.kwargs, len(own))
        return None if call.args else RowCall.of((), {HIDDEN: own, **call.kwargs}, len(own))

    def _reached(self) -> list[tuple[Tensor, LayerCall, TokenMasks]]:
        return [
            (one.hidden, one.calls[self.index], mask)
            for one, mask in zip(self.batches, self.masks)
            if self.index in one.calls and one.hidden is not None
        ]

    def input_hessians(self, names: Sequence[str] | None = None) -> list[InputHessian]:
        """Run the layer over all batches and return what its linear layers saw, padding left out.

        names: relative to the layer; None is all.  A linear layer that saw no token is in no result. Raises ModelError
        when one saw NaN or infinite values.
        """
        return self._observe(names, GRAM)

    def largest_squares(self, names: Sequence[str] | None = None) -> list[InputSquares]:
        """Return the largest square of each input of the linear layers, for a fraction of the Hessians' cost."""
        return self._observe(names, LARGEST_SQUARES)

    def compress_(
        self, names: Sequence[str], statistic: Statistic[Observed], compress: Callable[[Observed], None]
    ) -> None:
        """Hand a statistic of what linear layers see to ``compress``, which changes or replaces them in the model.

        Where all batches can be joined into one call whose activations fit, this takes one forward pass, see
        ``together``: the hidden states are advanced then, and linear layers are calibrated on what the compressed ones
        before them give, but for a statistic ``of_dense``, see ``dense_part``. Otherwise, and where the layer has
        experts, all see the layer as it was.  Raises ModelError as ``input_hessians`` does.
        """

        def checked(found: Observed) -> None:
            refuse_non_finite(self.name, [found])
            compress(found)

        if not self._compress_joined_(names, statistic, checked):
            for portion in in_portions(self.layer, names):
                totals = self._observe(portion, statistic)
                while totals:
                    compress(totals.pop(0))

    def _compress_joined_(
        self, names: Sequence[str], statistic: Statistic[Observed], compress: Callable[[Observed], None]
    ) -> bool:
        """Return False, with nothing done, where one joined pass is not possible."""
        linears = {name: module for name, module in linear_weights_of(self.layer).items() if name in names}
        joined = None if split_experts(self.layer) else self.joined_()
        if joined is None:
            return False
        call, masks, hidden = joined
        first = first_rows(call, len(hidden))
        with watching(self.layer):
            groups, others = call_order(self.layer, lambda: first.run(self.layer, hidden[:1]), linears)
            if others:
                return False
            self.take_(JoinedPass(Ground(self.layer, linears, groups, masks), statistic, compress).run(call, hidden))
        return True

    def joined_(self) -> tuple[LayerCall, TokenMasks, Tensor] | None:
        """Return all batches as one, or None where they do not fit together or not into memory.

        The batches' hidden states are parts of the joined ones from then on.
        """
        hidden = self.hidden_states
        if len({states.shape[1:] for states in hidden}) != 1:
            return None
        sizes = [len(states) for states in hidden]
        call = join_calls([call for _, call, _ in self._reached()], sizes)
        masks = join_masks([mask for _, _, mask in self._reached()], sizes)
        tokens = sum(states.shape[:-1].numel() for states in hidden)
        if call is None or masks is None or not fits_joined(self.layer, tokens):
            return None
        whole = [one.whole for one in self.batches if self.index in one.calls and one.hidden is not None]
        together = whole[0]
        if together is None or len(together) != sum(sizes) or any(one is not together for one in whole):
            together = torch.cat(hidden)
            self._give_(together)  # not kept twice
        return call, masks, together

    def take_(self, output: Tensor) -> None:
        """Go on with the layer's output of all batches, (rows, tokens, size), as it is advanced by."""
        for one in self._give_(output):
            one.calls.pop(self.index)

    def _give_(self, states: Tensor) -> list[RecordedBatch]:
        """Give each batch that reaches the layer its part of the hidden states of all."""
        batches = [one for one in self.batches if self.index in one.calls and one.hidden is not None]
        for one, part in zip(batches, states.split([len(states) for states in self.hidden_states])):
            one.hidden, one.whole = part, states
        return batches

    def _observe(self, names: Sequence[str] | None, statistic: Statistic[Observed]) -> list[Observed]:
        linears = linear_weights_of(self.layer)
        chosen = {name: module for name, module in linears.items() if names is None or name in names}

        def observe(some: Mapping[str, nn.Module]) -> list[Observed]:
            return observe_layer(self.layer, self.index, self.batches, self.masks, some, statistic)

        found = with_lent_tokens(self.layer, observe(chosen), chosen, observe)
        refuse_non_finite(self.name, found)
        return found

    def advance_(self) -> None:
        """Send the hidden states of all batches through the layer: in one call where ``compress_`` would do so."""
        joined = self.joined_()
        with watching(self.layer), unpacked(self.layer):
            if joined is not None:
                inside = [module for module in self.layer.modules() if module is not self.layer]
                with by_parts(inside, len(joined[2])):
                    self.take_(joined[0].run(self.layer, joined[2]))
                return
            for recorded in self.batches:
                call = recorded.calls.pop(self.index, None)
                if call is not None and recorded.hidden is not None:
                    recorded.hidden, recorded.whole = call.run(self.layer, recorded.hidden), None


def walk_layers(model: nn.Module, batches: Sequence[Batch]) -> Iterator[LayerVisit]:
    """Visit the layers of every stack in the order in which the model runs them.

    batches: keyword arguments of ``model``. In an encoder-decoder the decoder's turn comes after the encoder's, and it
    sees the encoder as it is by then. Layers that no batch reaches are visited too, without hidden states. Weights
    that lie on disk are loaded for the visit.  Raises ModelError when the model has no stack, or one that cannot be
    replayed.
    """
    stacks = layer_stacks(model)
    ordered = stacks_in_order(model, stacks, batches[0]) if len(stacks) > 1 else stacks
    for stack in ordered:
        masks = [token_masks(model, batch, is_last=stack is ordered[-1]) for batch in batches]
        yield from _walk_stack(stack, record_stack(model, stack, batches), masks)
    for stack in stacks:
        if stack not in ordered:
            yield from _walk_stack(stack, [], [])


def _walk_stack(
    stack: LayerStack, recorded: Sequence[RecordedBatch], masks: Sequence[TokenMasks]
) -> Iterator[LayerVisit]:
    for index, layer in enumerate(stack.layers):
        visit = LayerVisit(f"{stack.name}.{index}", layer, index, recorded, masks)
        bring_in_(layer)
        yield visit
        if index + 1 < len(stack):
            visit.advance_()
            give_back_holes()


def token_masks(model: nn.Module, batch: Batch, is_last: bool) -> TokenMasks:
    """A decoder, the last stack of an encoder-decoder, counts its own tokens by the decoder's mask."""
    mask = batch.get("attention_mask")
    if is_last and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return TokenMasks(own=batch.get("decoder_attention_mask"), context=mask)
    return TokenMasks(own=mask, context=mask)
