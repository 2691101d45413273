"""The linear layers of one layer in the order in which they run, each calibrated when those before it are compressed.

Beside what they see, it is added up how far this model is from the dense one where their outputs go: how much the sum
that a linear layer's output is part of (see ``sites``), or that output itself, differs. That is what the linear layer
can make up for when it is compressed; GPTAQ (arXiv 2504.02692) does so for the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from hfcompress.calibration.blocks import Blocks
from hfcompress.calibration.experts import in_portions
from hfcompress.calibration.hessian import accumulate_products_, mirror_triangle_
from hfcompress.calibration.joined import Ground
from hfcompress.calibration.observe import InputHessian, refuse_non_finite, tensor_key
from hfcompress.calibration.running import watching
from hfcompress.calibration.sites import OUTPUT, call_order, noting_inputs, summing_sites
from hfcompress.calibration.together import first_rows
from hfcompress.calibration.turn_pass import Turn, TurnPass, fit_one_pass, sums_are_plain
from hfcompress.calibration.walk import LayerVisit
from hfcompress.packed import unpacked
from hfcompress.packed.experts import expert_linears
from hfcompress.structure.stack import linear_weights_of

Rows = dict[str, Tensor]
KnownSites = dict[tuple[object, ...], dict[str, str]]


class _ReachedError(Exception):
    """Ends a layer's forward pass when what is looked for has been seen; never leaves this module."""


class _DivergedError(Exception):
    """Linear layers that shared an input in the first batch did not in another; never leaves this module."""


class Turns:
    """The turns of one layer whose linear layers ``names`` are still dense.

    dense_hidden: the layer's input in the dense model, for each batch that reaches it; its output is written over it.
    known: the sites of layers met before, by what they are made of; this layer's are added.  outputs: the layer's
    output in the dense model.
    """

    def __init__(
        self, visit: LayerVisit, names: Sequence[str], dense_hidden: Sequence[Tensor], known: KnownSites | None = None
    ) -> None:
        self.visit, self.layer = visit, visit.layer
        self.linears = [name for name in linear_weights_of(visit.layer) if name in names]
        with watching(self.layer), unpacked(self.layer):
            routed = {name for names in expert_linears(self.layer).values() for name in names}
            always = [name for name in self.linears if name not in routed]
            self.groups, late = call_order(self.layer, lambda: visit.output(0), always)
            self.late = [name for name in self.linears if name in routed or name in late]
            named = [name for group in self.groups for name in group]
            known = {} if known is None else known
            kind = (type(self.layer), *named, *(name for name, _ in self.layer.named_modules()))
            if kind not in known:
                known[kind] = summing_sites(self.layer, lambda: visit.output(0), named, dense_hidden[0])
            self.sites = known[kind]
            heads = {group[0] for group in self.groups if not self.sites.keys() >= {*group}}
            watched = {*self.sites.values(), *heads}
            self.dense: list[Rows] = []
            self.outputs: list[Tensor] = []
            blocks = Blocks([hidden.shape[:2].numel() for hidden in dense_hidden])
            for index, hidden in enumerate(dense_hidden):
                rows = self._rows(index, watched, hidden, blocks)
                self.outputs.append(rows.pop(HIDDEN))
                self.dense.append(rows)

    def take_(self, compress: Callable[[Turn], None], stay: bool = False) -> None:
        """Have the linear layers compressed turn by turn, in one pass over all batches where that can be.

        compress: replaces a turn's linear layers.  stay: do not advance the hidden states, as one pass would.
        """
        # With nothing to compress, what the layer gives is not known yet: it may be another one when the walk goes on.
        if not (self.groups and self._take_joined_(compress, stay)):
            for turn in self:
                compress(turn)

    def _take_joined_(self, compress: Callable[[Turn], None], stay: bool) -> bool:
        """Return False, with nothing done, where one pass is not possible."""
        seen = {name for rows in self.dense for name in rows}
        fits = not self.late and fit_one_pass(self.groups, self.sites)
        joined = self.visit.joined_() if fits and all(rows.keys() == seen for rows in self.dense) else None
        if joined is None:
            return False

        def checked(turn: Turn) -> None:
            refuse_non_finite(self.visit.name, [turn.found])
            compress(turn)

        call, masks, hidden = joined
        linears = {name: self.layer.get_submodule(name) for group in self.groups for name in group}
        with watching(self.layer):
            first = first_rows(call, len(hidden))
            if not sums_are_plain(self.layer, lambda: first.run(self.layer, hidden[:1]), self.sites):
                return False
            dense = {name: [rows.pop(name) for rows in self.dense] for name in seen}
            turns = TurnPass(Ground(self.layer, linears, self.groups, masks), self.sites, dense, checked)
            output = turns.run(call, hidden.clone() if stay else hidden)
            if not stay:
                self.visit.take_(output)
        return True

    def __iter__(self) -> Iterator[Turn]:
        """Yield turn by turn; the caller compresses a turn's linear layers before it asks for the next."""
        for group in self.groups:
            try:
                yield self._turn(group)
            except _DivergedError:
                yield from (self._turn([name]) for name in group)
        if self.late:
            for portion in in_portions(self.layer, self.late):
                yield from (Turn(found, None, {}) for found in self.visit.input_hessians(portion))

    def _turn(self, group: list[str]) -> Turn:
        """Run all batches as far as the linear layers of a group need it."""
        head, sites = group[0], {name: self.sites[name] for name in group if name in self.sites}
        sums: dict[str, Tensor] = {}
        tokens = 0
        with watching(self.layer), unpacked(self.layer):
            for index, dense in enumerate(self.dense):
                rows = self._seen(index, group, set(sites.values()))
                if head not in rows:
                    continue
                inputs = rows[head]
                tokens += len(inputs)
                crosses = []
                if len(sites) < len(group):
                    lacking = dense[head].float() - inputs.float()
                    crosses.append((_total(sums, "lacking", inputs, inputs), lacking))
                for name, site in sites.items():
                    drift = dense[site].float() - rows[site].float()
                    crosses.append((_total(sums, f"drift {name}", drift, inputs), drift))
                accumulate_products_(_total(sums, "hessian", inputs, inputs), inputs, crosses)
        found = InputHessian(tuple(group), mirror_triangle_(sums.get("hessian", torch.empty(0, 0))), tokens)
        refuse_non_finite(self.visit.name, [found])
        return Turn(found, sums.get("lacking"), {name: sums[f"drift {name}"] for name in sites if tokens})

    def _seen(self, index: int, group: list[str], sites: set[str]) -> Rows:
        """Return what one batch has at the head of a group and at the sites; runs the layer no further."""
        keys = set()
        rows: Rows = {}
        wanted = {group[-1], *sites}

        def note(name: str, given: Tensor) -> None:
            if name in group:
                keys.add(tensor_key(given))
            rows.setdefault(name, self.visit.rows(index, given))
            wanted.discard(name)
            if not wanted:
                raise _ReachedError

        with suppress(_ReachedError), noting_inputs(self.layer, note, {*group, *sites} - {OUTPUT}):
            rows[OUTPUT] = self.visit.rows(index, self.visit.output(index))
        if len(keys) > 1:
            raise _DivergedError
        return rows

    def _rows(self, index: int, sites: set[str], hidden: Tensor, blocks: Blocks) -> Rows:
        """Return what the dense model has at some sites in one batch, and as ``HIDDEN`` the output as it is."""
        rows: Rows = {}

        def note(name: str, given: Tensor) -> None:
            if name not in rows:
                rows[name] = blocks.copy(name, self.visit.rows(index, given))

        with noting_inputs(self.layer, note, sites - {OUTPUT}):
            output = self.visit.output(index, hidden)
        if (output.dtype, output.shape) == (hidden.dtype, hidden.shape):
            output = hidden.copy_(output)
        return {**rows, OUTPUT: self.visit.rows(index, output), HIDDEN: output}


HIDDEN = "."  # no module's name


def _total(sums: dict[str, Tensor], key: str, outputs: Tensor, inputs: Tensor) -> Tensor:
    """Return the sum by its name, made where it is not there yet: (size of outputs, size of inputs) float32."""
    if key not in sums:
        sums[key] = torch.zeros(outputs.shape[-1], inputs.shape[-1], device=inputs.device)
    return sums[key]
