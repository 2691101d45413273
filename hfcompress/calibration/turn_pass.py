"""One pass over all batches in which a layer's linear layers are compressed in turn, each to make up for what lacks.

A linear layer that adds to hidden states is compressed where the sum is: until then it answers 0, so that what comes
to the sum's place is what its output is added to. There the dense layer's output gives the sum that it is corrected
by, and the compressed layer's output is added, as it would have been.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfcompress.calibration.hessian import accumulate_products_, mirror_triangle_
from hfcompress.calibration.integers import TOKENS
from hfcompress.calibration.joined import Ground, InputPass, outputs_of
from hfcompress.calibration.observe import InputHessian
from hfcompress.calibration.parts import row_parts
from hfcompress.calibration.record import LayerCall
from hfcompress.calibration.sites import OUTPUT, noting_inputs


@dataclass(frozen=True)
class Turn:
    """Linear layers that see the same input, as the layers before them are by now.

    lacking: (in, in) float32, the sum over tokens of (the dense model's - this model's input) times input; None where
    nothing is known of the dense model.  drift: for linear layers that add to hidden states, (out, in) float32, the
    sum of (the dense model's - this model's sum) times input.  The turn's own linear layers are dense in both.
    """

    found: InputHessian
    lacking: Tensor | None
    drift: Mapping[str, Tensor]

    def missing(self, name: str, weight: Tensor) -> Tensor | None:
        """Return what a linear layer has to make up for, the sum over tokens of outputs times inputs, (out, in).

        weight: (out, in), the dense one.
        """
        if name in self.drift or self.lacking is None:
            return self.drift.get(name)
        return weight.to(self.lacking) @ self.lacking


def fit_one_pass(groups: Sequence[Sequence[str]], sites: Mapping[str, str]) -> bool:
    """Tell whether every group can be compressed at one point of a pass: at its input, or alone where its sum is."""
    return all(len(group) == 1 or not sites.keys() & {*group} for group in groups)


def sums_are_plain(layer: nn.Module, run: Callable[[], Tensor], sites: Mapping[str, str]) -> bool:
    """Tell whether outputs may be added where the sums are, bit for bit: that nothing else becomes of them.

    run: runs the layer on one row and returns its output.
    """
    expected = run()
    outputs: dict[str, list[Tensor]] = {}

    def hook(site: str) -> Callable[..., Tensor]:
        def hold_back(module: nn.Module, args: object, output: Tensor) -> Tensor:
            outputs.setdefault(site, []).append(output)
            return torch.zeros_like(output)

        return hold_back

    def add(site: str, states: Tensor) -> None:
        for output in outputs.pop(site, []):
            states.add_(output.reshape(states.shape))

    handles = [layer.get_submodule(name).register_forward_hook(hook(site)) for name, site in sites.items()]
    try:
        with noting_inputs(layer, add, {*sites.values()} - {OUTPUT}):
            found = run()
        add(OUTPUT, found)
    finally:
        for handle in handles:
            handle.remove()
    return not outputs and torch.equal(found, expected)


class TurnPass(InputPass):
    """sites: where outputs of linear layers are summed, see ``summing_sites``; those that have one are groups alone.

    dense: what the dense model has at the sites, and as the inputs of groups without one, by the group's first name;
    (tokens, size) of each batch without padding, given up once used.  compress: gets every turn and replaces its
    linear layers.
    """

    def __init__(
        self,
        ground: Ground,
        sites: Mapping[str, str],
        dense: dict[str, list[Tensor]],
        compress: Callable[[Turn], None],
    ) -> None:
        super().__init__(ground)
        self.sites, self.dense, self.compress = sites, dense, compress
        self.plain: Mapping[str, Callable[[Tensor], Tensor]] = {
            name: module.forward for name, module in self.linears.items()
        }
        self.held: dict[str, list[tuple[str, list[Tensor]]]] = {}

    def run(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Return the output of the compressed layer.  hidden: (rows, tokens, size), of all batches."""
        with noting_inputs(self.layer, self._sum_, {*self.sites.values()} - {OUTPUT}):
            return super().run(call, hidden)

    def finished_(self, output: Tensor) -> Tensor:
        """Compress what was held back for the layer's own output, and add what it gives then."""
        self._sum_(OUTPUT, output)
        assert not self.held, "sites were learnt on the layer's first batch"
        return output

    def awaits(self, name: str) -> bool:
        """Tell whether a sum is awaited inside a module: it has to be there for all rows."""
        return any(site.startswith(f"{name}.") for site in self.held)

    def meet_(self, group: tuple[str, ...], parts: Sequence[Tensor]) -> None:
        """Compress a group, or hold its input back for the sum."""
        site = self.sites.get(group[0])
        if site is None:
            with self.compressing(group):
                self.compress(self._turn(group, parts, parts, self.dense.pop(group[0])))
        else:
            whole = len(parts) == 1 and parts[0].dim() > 2
            held = [parts[0][rows] for rows in row_parts(parts[0])] if whole else list(parts)
            self.held.setdefault(site, []).append((group[0], held))
            self.kept |= {part.untyped_storage().data_ptr() for part in held}

    def answer(self, name: str, inputs: Tensor) -> Tensor | None:
        """Return zeros in the place of what is held back."""
        if not any(name == one for group in self.held.values() for one, _ in group):
            return None
        return inputs.new_zeros(*inputs.shape[:-1], outputs_of(self.linears[name]))

    def _sum_(self, site: str, states: Tensor) -> None:
        """Compress what was held back for a sum, and add to the states, (rows, tokens, size), what it gives then."""
        if self.instead is not None or site not in self.held:
            return
        dense = self.dense.pop(site)
        for name, parts in self.held.pop(site):
            places = [states] if len(parts) == 1 else [states[rows] for rows in row_parts(states)]
            plain = self.plain[name]
            sums = (place + plain(part).reshape(place.shape) for place, part in zip(places, parts))
            with self.compressing((name,)):
                self.compress(self._turn((name,), parts, sums, dense))
            now = self.layer.get_submodule(name)
            answer = plain if now is self.linears[name] else now
            for place, part in zip(places, parts):
                place.add_(answer(part).reshape(place.shape))

    def _turn(
        self, group: tuple[str, ...], parts: Iterable[Tensor], here: Iterable[Tensor], dense: Sequence[Tensor]
    ) -> Turn:
        """Return a turn.  parts, here: of the inputs, and of what the model has where ``dense`` is what it should."""
        hessian = cross = torch.empty(0, 0)
        tokens = 0
        for inputs, own in zip(self.real_rows(parts), self.real_rows(here)):
            if not len(inputs):
                continue
            if not tokens:
                hessian, cross = (
                    torch.zeros(states.shape[-1], inputs.shape[-1], device=inputs.device) for states in (inputs, own)
                )
            for chunk, states in zip(inputs.split(TOKENS), own.split(TOKENS)):
                lacking = _rows_from(dense, tokens, len(chunk)).float() - states.float()
                accumulate_products_(hessian, chunk, [(cross, lacking)])
                tokens += len(chunk)
        found = InputHessian(group, mirror_triangle_(hessian), tokens)
        sited = group[0] in self.sites
        return Turn(found, None if sited else cross, {group[0]: cross} if sited and tokens else {})


def _rows_from(batches: Sequence[Tensor], start: int, count: int) -> Tensor:
    """Return so many rows of what several batches have, (tokens, size) each, as if they were one."""
    found = []
    for batch in batches:
        rows = batch[max(start, 0) : max(start + count, 0)]
        found += [rows] if len(rows) else []
        start -= len(batch)
    return found[0] if len(found) == 1 else torch.cat(found)
