"""Scales moved from the inputs of linear layers into the norm before them, only where that changes nothing.

``norm(x) / s`` read by ``weight * s`` is what it was.  Which norm feeds which linear layers is seen while a layer
runs; whether something else reads the norm too (a residual, a router), and what its weight means (Gemma's stands for
one more), is tried out: the layer is run with random scales, and a fold that changes its output is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.structure.stack import linear_weights_of

Run = Callable[[], Tensor]
Changes = dict[nn.Parameter, Tensor]
OFFSETS = (0.0, 1.0)  # what a norm adds to its weight: nothing, or one
EXACT = 1e-6  # powers of two change no bit where the weight is the factor itself


@dataclass(frozen=True)
class NormFold:
    """A norm, and all linear layers that read it, in one layer.

    offset: what the norm adds to its weight before it multiplies.
    """

    norm: nn.Module
    readers: dict[str, nn.Linear]
    offset: float


def find_norm_folds(layer: nn.Module, run: Run) -> list[NormFold]:
    """Return the norms of a layer whose outputs are read by its linear layers and by nothing else.

    run: runs the layer and returns its hidden states; the layer is left as it was.
    """
    expected, fed = _watch(layer, run)
    folds = []
    for norm, readers in fed.items():
        if not all(type(one) is nn.Linear for one in readers.values()):
            continue
        fits = (offset for offset in OFFSETS if _changes_nothing(NormFold(norm, readers, offset), run, expected))
        offset = next(fits, None)
        if offset is not None:
            folds.append(NormFold(norm, readers, offset))
    return folds


def _watch(layer: nn.Module, run: Run) -> tuple[Tensor, dict[nn.Module, dict[str, Any]]]:
    """Run a layer and return its output, and the linear layers that read each norm's output."""
    linears = linear_weights_of(layer)
    owner: dict[int, nn.Module] = {}
    fed: dict[nn.Module, dict[str, Any]] = {}
    kept: list[Any] = []  # or an address could be given to another tensor

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            kept.append(output)
            owner[output.data_ptr()] = module

    def before(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            norm = owner.get(args[0].data_ptr())
            if norm is not None and len(_weight(norm)) == args[0].shape[-1]:
                fed.setdefault(norm, {})[name] = module

        return see

    handles = [one.register_forward_hook(after) for one in layer.modules() if _is_norm(one)]
    handles += [one.register_forward_pre_hook(before(name)) for name, one in linears.items()]
    try:
        return run(), fed
    finally:
        for handle in handles:
            handle.remove()


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and weight.is_floating_point()


def _weight(norm: nn.Module) -> nn.Parameter:
    weight = norm._parameters["weight"]
    assert weight is not None
    return weight


def _changes_nothing(fold: NormFold, run: Run, expected: Tensor) -> bool:
    random = torch.Generator().manual_seed(0)
    powers = torch.randint(-1, 2, (len(_weight(fold.norm)),), generator=random).float()
    changes: Changes = {}
    with undone(changes):
        fold_(fold, 2.0 ** powers.to(expected.device), changes)
        found = run()
    difference = float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12))
    return difference <= (EXACT if fold.offset == 0 else max(1e-5, 4 * torch.finfo(expected.dtype).eps))


def fold_(fold: NormFold, scale: Tensor, changes: Changes) -> Tensor:
    """Divide the norm's output by a scale for each feature, multiply its readers' columns by it.

    scale: (features,) float32, positive.  changes: takes the values from before.  Returns the scale as the
    norm's dtype lets it be.
    """
    weight = _weight(fold.norm)
    factor = weight.detach().float() + fold.offset
    stored = (factor / scale - fold.offset).to(weight.dtype)
    realised = factor / (stored.float() + fold.offset)
    usable = torch.isfinite(realised) & (realised > 0)
    realised = torch.where(usable, realised, 1.0)
    _set_(weight, torch.where(usable, stored, weight.detach()), changes)
    bias = fold.norm._parameters.get("bias")
    if isinstance(bias, nn.Parameter):
        _set_(bias, (bias.detach().float() / realised).to(bias.dtype), changes)
    for reader in fold.readers.values():
        _set_(reader.weight, (reader.weight.detach().float() * realised).to(reader.weight.dtype), changes)
    return realised


def _set_(parameter: Any, value: Tensor, changes: Changes) -> None:
    changes.setdefault(parameter, parameter.data)
    parameter.data = value


def undo_(changes: Changes) -> None:
    """Bring back what was changed."""
    for parameter, before in changes.items():
        parameter.data = before
    changes.clear()


@contextmanager
def undone(changes: Changes) -> Iterator[None]:
    """Bring back what was changed when the block ends."""
    try:
        yield
    finally:
        undo_(changes)
