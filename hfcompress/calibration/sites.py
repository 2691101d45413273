"""In which order the linear layers of a layer run, and where their outputs are added to the hidden states.

Most layers of Transformers add what their attention and their feed-forward network give to the hidden states. A linear
layer whose output is such a summand can make up for an error that the hidden states carry already, so it is good to
know the sum. It is the input of a module that runs later, or the layer's own output: where random numbers added to the
linear layer's output arrive unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.observe import tensor_key

OUTPUT = ""  # the site that is the layer's output
UNCHANGED = 0.02  # the share of a push that may be lost to rounding


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return what a module gets first, if it is a tensor."""
    given = args[0] if args else next(iter(kwargs.values()), None)
    return given if isinstance(given, Tensor) else None


@contextmanager
def noting_inputs(layer: nn.Module, note: Callable[[str, Tensor], None], names: Iterable[str]) -> Iterator[None]:
    """Call ``note`` with the name and the first input of modules inside a layer, just before they run."""

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = first_tensor(args, kwargs)
            if given is not None:
                note(name, given)

        return see

    handles = [layer.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def call_order(layer: nn.Module, run: Callable[[], Tensor], names: Iterable[str]) -> tuple[list[list[str]], list[str]]:
    """Return linear layers that share an input, in the order in which they run, and those that do not run just once.

    run: runs the layer on one batch or row.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    kept: list[Tensor] = []
    calls: list[str] = []
    names = list(names)

    def note(name: str, given: Tensor) -> None:
        kept.append(given)  # or its address could be given to another tensor
        groups.setdefault(tensor_key(given), []).append(name)
        calls.append(name)

    with noting_inputs(layer, note, names):
        run()
    once = {name for name in calls if calls.count(name) == 1}
    ordered = [[name for name in group if name in once] for group in groups.values()]
    return [group for group in ordered if group], [name for name in names if name not in once]


def summing_sites(layer: nn.Module, run: Callable[[], Tensor], names: Sequence[str], hidden: Tensor) -> dict[str, str]:
    """Return, for the linear layers among ``names`` whose output is a summand of hidden states, the site of the sum.

    run: runs the layer on one batch and returns its output.  hidden: the layer's input in it, (batch, tokens, size).
    A site is the name of the module whose input the sum is, or ``OUTPUT``; the last one where there are several.
    """
    inside = [name for name, _ in layer.named_modules() if name]
    before = _inputs(layer, run, inside)
    push = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    sizes = [states.float().square().mean().sqrt() for states in (hidden, before[OUTPUT])]
    found: dict[str, str] = {}
    # A first layer's output may be so far above its input that rounding loses a push of the input's size. A large one
    # comes second: what it changes beside the sum would be small against it.
    for size in sizes if sizes[1] > sizes[0] else sizes[:1]:
        sized = push * size.to(push)
        for name in names:
            if name in found:
                continue
            handle = layer.get_submodule(name).register_forward_hook(_pushing(sized))
            try:
                after = _inputs(layer, run, inside)
            finally:
                handle.remove()
            sites = [site for site, states in after.items() if _arrived(sized, before.get(site), states)]
            found |= {name: sites[-1]} if sites else {}
    return found


def _inputs(layer: nn.Module, run: Callable[[], Tensor], inside: Iterable[str]) -> dict[str, Tensor]:
    """Return what the modules inside a layer get, in the order in which they run, and the layer's output at last."""
    seen: dict[str, Tensor] = {}

    def note(name: str, given: Tensor) -> None:
        seen.setdefault(name, given)

    with noting_inputs(layer, note, inside):
        output = run()
    return {**seen, OUTPUT: output}


def _pushing(push: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + push.reshape(output.shape) if output.numel() == push.numel() else output

    return hook


def _arrived(push: Tensor, before: Tensor | None, after: Tensor) -> bool:
    """Tell whether the push is all that changed, for at least half of the tokens."""
    if before is None or before.shape != after.shape or after.numel() != push.numel():
        return False
    if after.shape[-1] != push.shape[-1]:
        return False
    push = push.float().reshape(-1, push.shape[-1])
    lost = (after.float() - before.float()).reshape(push.shape).sub(push).norm(dim=-1)
    return bool((lost / push.norm(dim=-1)).median() < UNCHANGED)
