"""What linear layers see while all of their layer is dense, estimated in the one pass that compresses it.

In that pass a linear layer sees what the compressed ones before it give. So a part of the rows goes through the dense
layer first, and by how much each input's total differs there, it is corrected over all rows: a ratio estimator
(Cochran, Sampling Techniques, chapter 6). Both totals of the part are of the same tokens, so it needs few of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from hfcompress.calibration.observe import Observed, Statistic, TokenMasks, real_tokens
from hfcompress.calibration.parts import row_parts
from hfcompress.calibration.record import LayerCall
from hfcompress.calibration.sites import noting_inputs
from hfcompress.calibration.together import first_rows

MOST = 2.0  # times that an input is corrected by: a part tells little of inputs that are seldom other than 0


class _SeenError(Exception):
    """Ends the part's pass at the last linear layer that is looked at; never leaves this module."""


class DensePart:
    """The first of all rows, as they go through a layer before any of it is compressed.

    totals: of the inputs of each group of linear layers but the first, by the first one's name; (in,) each.
    is_all: whether there are no other rows.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        groups: Sequence[Sequence[str]],
        masks: TokenMasks,
        statistic: Statistic[Observed],
    ) -> None:
        assert statistic.dimensions == 1
        self.layer, self.masks, self.statistic = layer, masks, statistic
        self.heads = [group[0] for group in groups[1:]]
        self.totals: dict[str, Tensor] = {}
        self.is_all = False

    def run(self, call: LayerCall, hidden: Tensor) -> None:
        """Send the part through the layer.  hidden: (rows, tokens, size), of all rows."""
        part = row_parts(hidden)[0]
        masks, context = self.masks.of_rows(0, part.stop), call.context_pointers()
        self.is_all = part.stop == len(hidden)
        left = {*self.heads}

        def note(name: str, given: Tensor) -> None:
            # What comes from the encoder is the same in the compressed layer, and flat states have no rows.
            if given.data_ptr() not in context and given.dim() > 2 and name not in self.totals:
                self.totals[name] = self.statistic.empty(given)
                self.statistic.add_(self.totals[name], real_tokens(given, masks.own))
            left.discard(name)
            if not left:
                raise _SeenError

        if left:
            with suppress(_SeenError), noting_inputs(self.layer, note, self.heads):
                first_rows(call, len(hidden), part.stop).run(self.layer, hidden[part])

    def corrected(self, head: str, total: Tensor, own: Tensor) -> Tensor:
        """Return what a group's total over all rows would be in the dense layer.

        total, own: (in,), over all rows and over the part, with what is before the group compressed.
        """
        dense = self.totals.get(head)
        if dense is None or self.is_all:
            return total if dense is None else dense
        ratio = torch.where(own > 0, dense / own, 1.0)
        return total * ratio.clamp(1 / MOST, MOST)
