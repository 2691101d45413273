"""Scales moved from the inputs of linear layers into what is before them, only where that changes nothing.

``norm(x) / s`` read by ``weight * s`` is what it was.  Which norm feeds which linear layers is seen while a layer
runs; whether something else reads the norm too (a residual, a router), and what its weight means (Gemma's stands for
one more), is tried out: the layer is run with random scales, and a fold that changes its output is none.  Folds into
a linear layer before are found in ``linear_folds``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hfcompress.calibration import LayerVisit
from hfcompress.calibration.running import watching
from hfcompress.structure.stack import linear_weights_of

Run = Callable[[], Tensor]
Changes = dict[nn.Parameter, Tensor]
OFFSETS = (0.0, 1.0)  # what a norm adds to its weight: nothing, or one
EXACT = 1e-6  # powers of two change no bit where the weight is the factor itself
SMALLEST, LARGEST = 1e-4, 1e4  # of a scale


class Fold(Protocol):
    """What makes the inputs of some linear layers, and can make them smaller.

    A unit is a feature of what is before; each column of its readers is made of one.
    """

    @property
    def readers(self) -> dict[str, nn.Linear]:
        """All linear layers that read it, by their names in the layer."""

    @property
    def units(self) -> int:
        """How many units it has."""

    @property
    def unit_of_column(self) -> Tensor | None:
        """The unit of each of the readers' columns; None where column i is unit i."""

    @property
    def tolerance(self) -> float:
        """How much a layer's output may change, relatively, when scales are powers of two."""

    def divide_(self, scale: Tensor, changes: Changes) -> Tensor:
        """Divide each unit by its scale and return the scales as the dtype lets them be.  scale: (units,) float32."""


@dataclass(frozen=True)
class NormFold:
    """A norm, and all linear layers that read it, in one layer.

    offset: what the norm adds to its weight before it multiplies.
    """

    norm: nn.Module
    readers: dict[str, nn.Linear]
    offset: float
    unit_of_column: None = None

    @property
    def units(self) -> int:
        """How many features the norm has."""
        return len(_weight(self.norm))

    @property
    def tolerance(self) -> float:
        """What a weight of one more loses."""
        return EXACT if self.offset == 0 else max(1e-5, 4 * torch.finfo(_weight(self.norm).dtype).eps)

    def divide_(self, scale: Tensor, changes: Changes) -> Tensor:
        """Divide the norm's weight and bias; a scale that its dtype cannot take is 1."""
        weight = _weight(self.norm)
        factor = weight.detach().float() + self.offset
        stored = (factor / scale - self.offset).to(weight.dtype)
        realised = factor / (stored.float() + self.offset)
        usable = torch.isfinite(realised) & (realised > 0)
        realised = torch.where(usable, realised, 1.0)
        set_(weight, torch.where(usable, stored, weight.detach()), changes)
        bias = self.norm._parameters.get("bias")
        if isinstance(bias, nn.Parameter):
            set_(bias, (bias.detach().float() / realised).to(bias.dtype), changes)
        return realised


Find = Callable[[nn.Module, Run, set[str], set[str]], Sequence[Fold]]


def folds_of(visit: LayerVisit, wanted: set[str], find: Find | None = None) -> list[Fold]:
    """Return what can be folded in a layer, of which all readers are ``wanted``: norms, and what ``find`` finds.

    find: given the layer, how to run it, what is wanted, and which of it no norm feeds.
    """
    if not visit.hidden_states or not wanted:
        return []

    def run() -> Tensor:
        return visit.output(0)

    with watching(visit.layer):
        norms = [fold for fold in find_norm_folds(visit.layer, run) if fold.readers.keys() <= wanted]
        fed = {name for fold in norms for name in fold.readers}
        return [*norms, *(find(visit.layer, run, wanted, wanted - fed) if find is not None else ())]


def find_norm_folds(layer: nn.Module, run: Run) -> list[NormFold]:
    """Return the norms of a layer whose outputs are read by its linear layers and by nothing else.

    run: runs the layer and returns its hidden states; the layer is left as it was.
    """
    expected, fed = _watch(layer, run)
    folds = []
    for norm, readers in fed.items():
        if not all(type(one) is nn.Linear for one in readers.values()):
            continue
        fits = (offset for offset in OFFSETS if changes_nothing(NormFold(norm, readers, offset), run, expected))
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


def around_one(scale: Tensor) -> Tensor:
    """Divide scales by their geometric mean, which rounding does not see; those of dead units are 1.

    Around 1 what is divided stays in the middle of its dtype's range.  Dead: not positive, or not finite.
    """
    usable = torch.isfinite(scale) & (scale > 0)
    logs = torch.where(usable, scale, 1.0).log()
    mean = logs.sum() / usable.sum().clamp_min(1)
    return torch.where(usable, (logs - mean).exp(), 1.0).clamp(SMALLEST, LARGEST)


def per_column(fold: Fold, scale: Tensor) -> Tensor:
    """Return the scale of each of the readers' columns, (in,).  scale: (units,)."""
    return scale if fold.unit_of_column is None else scale[fold.unit_of_column]


def changes_nothing(fold: Fold, run: Run, expected: Tensor) -> bool:
    """Tell whether a layer's output stays with random powers of two for scales.  expected: the output without."""
    random = torch.Generator().manual_seed(0)
    powers = torch.randint(-1, 2, (fold.units,), generator=random).float()
    changes: Changes = {}
    with undone(changes):
        fold_(fold, 2.0 ** powers.to(expected.device), changes)
        found = run()
    difference = float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12))
    return difference <= fold.tolerance


def fold_(fold: Fold, scale: Tensor, changes: Changes) -> Tensor:
    """Divide what is read by a scale for each unit, multiply the readers' columns by it.

    scale: (units,) float32, positive.  changes: takes the values from before.  Returns the scale as the
    dtype of what is divided lets it be.
    """
    realised = fold.divide_(scale, changes)
    factor = per_column(fold, realised)
    for reader in fold.readers.values():
        set_(reader.weight, (reader.weight.detach().float() * factor).to(reader.weight.dtype), changes)
    return realised


def set_(parameter: Any, value: Tensor, changes: Changes) -> None:
    """Give a parameter another value; what it was goes into ``changes`` once."""
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
