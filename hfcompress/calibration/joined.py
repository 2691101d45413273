"""A forward pass of a layer in which linear layers are compressed when their input is there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfcompress.calibration.attention import usual_functions
from hfcompress.calibration.dense_part import DensePart
from hfcompress.calibration.integers import TOKENS
from hfcompress.calibration.observe import Observed, Statistic, TokenMasks, real_tokens, tensor_key
from hfcompress.calibration.parts import (
    RowCall,
    by_parts,
    joined_rows,
    replaced_forwards,
    row_parts,
    small_modules,
    states_and_rest,
)
from hfcompress.calibration.record import LayerCall
from hfcompress.calibration.spent import inputs_are_spent
from hfcompress.calibration.together import first_rows
from hfcompress.packed import unpacked


class _SeenError(Exception):
    """Ends a network's forward pass at its first linear layer; never leaves this module."""


def outputs_of(linear: nn.Module) -> int:
    """Return how many outputs a dense linear layer has."""
    assert isinstance(linear.weight, Tensor)
    return linear.weight.shape[1 if isinstance(linear, Conv1D) else 0]


@dataclass(frozen=True)
class Ground:
    """What a pass goes over: a layer, and the linear layers in it that are met, in groups that share an input."""

    layer: nn.Module
    linears: Mapping[str, nn.Module]
    groups: Sequence[Sequence[str]]
    masks: TokenMasks


class InputPass(ABC):
    """A forward pass of a layer that meets each group of linear layers when all of its input is there."""

    def __init__(self, ground: Ground) -> None:
        self.layer, self.linears, self.masks = ground.layer, ground.linears, ground.masks
        self.groups = [tuple(group) for group in ground.groups]
        self.group_of = {name: group for group in self.groups for name in group}
        self.waiting = set(self.groups)
        self.context: set[int] = set()
        self.rows = 0
        self.spent = False
        self.kept: set[int] = set()  # addresses of what is read later on by this pass itself
        self.instead: Callable[[str, Tensor], Tensor | None] | None = None
        self.until_done = ExitStack()

    @abstractmethod
    def meet_(self, group: tuple[str, ...], parts: Sequence[Tensor]) -> None:
        """Do what is to be done with a group that was not met before.  parts: of its input, (rows, ..., in) each."""

    def answer(self, name: str, inputs: Tensor) -> Tensor | None:
        """Return what a linear layer answers once it was met; None is what it gives as it is in the layer by then."""
        return None

    def awaits(self, name: str) -> bool:
        """Tell whether a module has to be called once for all rows, and not by parts."""
        return False

    def run(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Return the output of the compressed layer.  hidden: (rows, tokens, size), of all batches."""
        self.context, self.rows = call.context_pointers(), len(hidden)
        networks = self._networks()
        if networks:
            row = first_rows(call, self.rows)
            self.spent = inputs_are_spent(self.layer, networks, lambda one: row.run(self.layer, one), hidden[:1])
        linears = ((module, self._meeting(name, module)) for name, module in self.linears.items())
        forwards = (self._step_by_step(name, hidden if name == networks[-1] else None) for name in networks)
        small = by_parts(small_modules(self.layer), self.rows)
        with self.until_done:
            with small, replaced_forwards(forwards), replaced_forwards(linears):
                output = call.run(self.layer, hidden)
            return self.finished_(output)

    def finished_(self, output: Tensor) -> Tensor:
        """Do what waited for the layer's output, and return it."""
        return output

    @contextmanager
    def compressing(self, group: tuple[str, ...]) -> Iterator[None]:
        """Have a group's linear layers compressed in it; what is packed then is unpacked once for the whole pass."""
        with usual_functions():
            yield
            for name in group:
                self.until_done.enter_context(unpacked(self.layer.get_submodule(name)))

    def _groups_inside(self, name: str) -> list[tuple[str, ...]]:
        """Return the groups with linear layers inside a module."""
        return [group for group in self.groups if any(one.startswith(f"{name}.") for one in group)]

    def _meeting(self, name: str, module: nn.Module) -> Callable[..., Tensor]:
        """Meet a linear layer's group when it is called, and let the one that is there then answer."""
        plain = module.forward

        def forward(inputs: Tensor) -> Tensor:
            given = None if self.instead is None else self.instead(name, inputs)
            if given is not None:
                return given
            self._meet_once_(self.group_of[name], [inputs])
            answer = self.answer(name, inputs)
            if answer is not None:
                return answer
            now = self.layer.get_submodule(name)
            output: Tensor = plain(inputs) if now is module else now(inputs)
            return output

        return forward

    def _networks(self) -> list[str]:
        """Return modules that are attention or a network: a linear layer after a function of others' outputs.

        In the order in which they run.
        """
        inside = {name: self._groups_inside(name) for name, _ in self.layer.named_modules() if name}
        found = [name for name, groups in inside.items() if len(groups) == 2 and len(groups[1]) == 1]
        return sorted(found, key=lambda name: self.groups.index(inside[name][1]))

    def _step_by_step(self, name: str, hidden: Tensor | None) -> tuple[nn.Module, Callable[..., Any]]:
        """Return attention or a network, and what runs it by parts as far as can be seen.

        hidden: what is given up as it begins, where that is spent.
        """
        module = self.layer.get_submodule(name)
        first, (last,) = self._groups_inside(name)
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if hidden is not None and self._is_spent(hidden):
                hidden.untyped_storage().resize_(0)
            call = RowCall.of(args, kwargs, self.rows)
            if call is None or self.awaits(name) or not self._begins_with(first, plain, call):
                return plain(*args, **kwargs)
            self._meet_once_(first, [call.states])
            found = self._inputs_of(last, plain, call)
            if found is None:
                return plain(*args, **kwargs)
            inputs, rest = found
            self._meet_once_((last,), inputs)
            linear = self.layer.get_submodule(last)
            rows = sum(len(part) for part in inputs)
            outputs = (linear(inputs.pop(0)) for _ in range(len(inputs)))
            output = joined_rows(outputs, rows, call.states if self._is_spent(call.states) else None)
            return output if rest is None else (output, *rest)

        return module, forward

    def _is_spent(self, states: Tensor) -> bool:
        return self.spent and states.untyped_storage().data_ptr() not in self.kept

    @contextmanager
    def _answering(self, instead: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
        """Let a function answer for linear layers; where it returns None they answer themselves."""
        self.instead = instead
        try:
            yield
        finally:
            self.instead = None

    def _begins_with(self, group: tuple[str, ...], plain: Callable[..., Any], call: RowCall) -> bool:
        """Tell whether all that a module does first is to hand its input to a group of linear layers."""
        row = call.states[:1]
        found = False

        def see(name: str, inputs: Tensor) -> None:
            nonlocal found
            found = name in group and tensor_key(inputs) == tensor_key(row)
            raise _SeenError

        with self._answering(see), suppress(_SeenError):
            call.run(plain, slice(0, 1))
        return found and call.states.data_ptr() not in self.context

    def _inputs_of(
        self, last: str, plain: Callable[..., Any], call: RowCall
    ) -> tuple[list[Tensor], tuple[Any, ...] | None] | None:
        """Run a module as far as its last linear layer; None where that layer's output is not the module's.

        Returns what the linear layer gets, and what the module returns beside its output: None for nothing.
        """
        seen: list[tuple[Tensor, Tensor]] = []
        size = outputs_of(self.linears[last])

        def catch(name: str, inputs: Tensor) -> Tensor | None:
            if name != last:
                return None
            seen.append((inputs, inputs.new_empty(*inputs.shape[:-1], size)))
            return seen[-1][1]

        parts = row_parts(call.states)
        inputs: list[Tensor] = []
        rest: tuple[Any, ...] | None = None
        with self._answering(catch):
            for index, rows in enumerate(parts):
                found = states_and_rest(call.run(plain, rows))
                if found is None or len(seen) != 1 or tensor_key(found[0]) != tensor_key(seen[0][1]):
                    return None
                rest, part = found[1], seen.pop()[0]
                # All come to lie side by side: between them would be gaps where the network held what it needs.
                length = len(part) // (rows.stop - rows.start)
                inputs = inputs or [part.new_empty((one.stop - one.start) * length, *part.shape[1:]) for one in parts]
                inputs[index].copy_(part)
                del found, part
        return inputs, rest

    def _meet_once_(self, group: tuple[str, ...], parts: Sequence[Tensor]) -> None:
        if group in self.waiting:
            self.waiting.discard(group)
            self.meet_(group, parts)

    def real_rows(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield what in each part is no padding, (tokens, size).

        parts: of some states of all rows, (rows, tokens, ..., size), or all in one, (rows * tokens, size).
        """
        start = 0
        for part in parts:
            masks = self.masks.of_rows(start, len(part)) if part.dim() > 2 else self.masks
            yield real_tokens(part, masks.context if part.data_ptr() in self.context else masks.own)
            start += len(part)


class JoinedPass(InputPass, Generic[Observed]):
    """A forward pass of a layer in which groups of linear layers are compressed when their input is there.

    compress: gets what a group sees, as the statistic of its inputs, and changes its linear layers or replaces them in
    the layer.
    """

    def __init__(self, ground: Ground, statistic: Statistic[Observed], compress: Callable[[Observed], None]) -> None:
        super().__init__(ground)
        self.statistic, self.compress = statistic, compress
        self.dense = DensePart(self.layer, self.groups, self.masks, statistic) if statistic.of_dense else None

    def run(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Return the output of the compressed layer.  hidden: (rows, tokens, size), of all batches."""
        if self.dense is not None:
            self.dense.run(call, hidden)
        return super().run(call, hidden)

    def meet_(self, group: tuple[str, ...], parts: Sequence[Tensor]) -> None:
        """Compress a group."""
        with self.compressing(group):
            self.compress(self._seen_by(group, parts))

    def _seen_by(self, group: tuple[str, ...], parts: Sequence[Tensor]) -> Observed:
        """Return the statistic of a group's inputs."""
        total = self.statistic.empty(parts[0])
        first, tokens = None, 0
        for rows in self.real_rows(self._by_rows(parts)):
            for chunk in rows.split(TOKENS):
                self.statistic.add_(total, chunk)
            tokens += len(rows)
            first = total.clone() if first is None and self.dense is not None else first
        if self.dense is not None and first is not None:
            total = self.dense.corrected(group[0], total, first)
        return self.statistic.result(group, self.statistic.finish_(total), tokens)

    def _by_rows(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return inputs that came whole in parts of rows where the first has to be known; not those of an encoder."""
        whole = parts[0]
        if self.dense is None or len(parts) > 1 or whole.dim() < 3 or whole.data_ptr() in self.context:
            return parts
        return [whole[rows] for rows in row_parts(whole)]
