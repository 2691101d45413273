"""What experts see: the tokens that are routed to each, and where those are few, some of all of the layer's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.observe import InputHessian, Observed
from hfcompress.calibration.parts import replaced_forwards
from hfcompress.packed.experts import SplitExperts, expert_linears, split_experts

# What the Hessians of the experts that are observed together may take.
MOST_BYTES = 1 << 32


def in_portions(layer: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Return names of linear layers in portions that are observed together: a few experts at a time, others last.

    Experts do not see each other's outputs, so all see the layer as it was.
    """
    wanted = set(names)
    experts: dict[str, list[str]] = {}
    for name in (name for linears in expert_linears(layer).values() for name in linears if name in wanted):
        experts.setdefault(name.rpartition(".")[0], []).append(name)
    portions: list[list[str]] = []
    held = MOST_BYTES
    for own in experts.values():
        needed = sum(4 * _columns(layer.get_submodule(name)) ** 2 for name in (own[0], own[-1]))
        if held + needed > MOST_BYTES:
            portions.append([])
            held = 0
        portions[-1] += own
        held += needed
    routed = {name for own in experts.values() for name in own}
    others = [name for name in names if name not in routed]
    return [*portions[:-1], [*(portions[-1] if portions else ()), *others]]


def with_lent_tokens(
    layer: nn.Module,
    found: list[Observed],
    linears: Mapping[str, nn.Module],
    observe: Callable[[Mapping[str, nn.Module]], list[Observed]],
) -> list[Observed]:
    """Return what linear layers see, where those of experts that too few tokens reach also see others.

    A matrix with ``in`` inputs that n < in tokens reach has a singular Hessian, or none. It gets the Hessian of the
    n tokens plus (in - n) times that of an average token of its layer: what the expert would see if all were routed
    to it.  found: of the layer's linear layers.  observe: gives the same for some of them, once more.
    """
    by_expert = [name for names in expert_linears(layer).values() for name in names if name in linears]
    own: dict[str, Any] = {name: one for one in found for name in one.names}
    cold = [name for name in by_expert if name not in own or own[name].tokens < _columns(linears[name])]
    if not cold:
        return found
    with replaced_forwards((one, _seeing_all(one, name, cold)) for name, one in split_experts(layer).items()):
        everyone: dict[str, Any] = {
            name: one for one in observe({name: linears[name] for name in cold}) for name in one.names
        }
    groups: dict[tuple[str, int, int], list[str]] = {}
    for name in cold:
        if name in everyone:
            expert = name.rpartition(".")[0]
            groups.setdefault((expert, id(everyone[name]), id(own.get(name))), []).append(name)
    lent: list[Any] = [_blended(names, own.get(names[0]), everyone[names[0]]) for names in groups.values()]
    return [*(one for one in found if not set(one.names) & set(cold)), *lent]


def _columns(linear: nn.Module) -> int:
    assert isinstance(linear.weight, Tensor)
    return linear.weight.shape[1]


def _blended(names: Sequence[str], own: InputHessian | None, everyone: InputHessian) -> InputHessian:
    """Return the Hessian of an expert's own tokens, filled up with the average one of its layer."""
    tokens = 0 if own is None else own.tokens
    lent = len(everyone.hessian) - tokens
    hessian = everyone.hessian * (lent / everyone.tokens)
    if own is not None:
        hessian += own.hessian
    return InputHessian(tuple(names), hessian, tokens, lent)


def _seeing_all(experts: SplitExperts, name: str, cold: Sequence[str]) -> Callable[..., Tensor]:
    """Have the experts of some linear layers see all tokens that count, whose results nobody needs."""
    indices = sorted({int(one.removeprefix(f"{name}.").split(".")[0]) for one in cold if one.startswith(f"{name}.")})

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens = hidden_states[(top_k_index < experts.count).any(dim=1)]
        for index in indices:
            if len(tokens):
                experts.run(index, tokens)
        return torch.zeros_like(hidden_states)

    return forward


class ColdExperts:
    """Counts matrices of experts that saw too few tokens, and says so at the end."""

    def __init__(self) -> None:
        self.all = 0
        self.cold: list[str] = []

    def count(self, layer_name: str, layer: nn.Module, inside: Sequence[str], found: Sequence[Any]) -> None:
        """Note what a layer's linear layers saw.  inside: their names in it."""
        chosen = set(inside)
        self.all += sum(name in chosen for names in expert_linears(layer).values() for name in names)
        for one in found:
            if isinstance(one, InputHessian) and one.lent:
                text = "{}.{}: {} tokens for {} input columns"
                self.cold += [text.format(layer_name, name, one.tokens, len(one.hessian)) for name in one.names]

    def warn(self) -> None:
        """Say how many there were, if any."""
        if self.cold:
            warnings.warn(
                f"{len(self.cold)} of {self.all} matrices of experts saw fewer calibration tokens than they have "
                f"input columns (such as {self.cold[0]}); the average token of their layer stands for those that they "
                "lack. Use more calibration data if these are many.",
                stacklevel=5,
            )
