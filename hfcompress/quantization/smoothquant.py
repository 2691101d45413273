"""SmoothQuant: large inputs are made smaller and the weights that read them larger, then both are rounded to 8 bits.

Xiao et al., arXiv 2211.10438.  The scales move into the norm before the linear layers, where nothing else reads it;
other layers are rounded as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from hfcompress.calibration import LayerVisit
from hfcompress.calibration.checks import observe_layers
from hfcompress.quantization.folding import Changes, around_one, fold_, folds_of
from hfcompress.quantization.options import FORBID_UNKNOWN, ByteCodes
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.report import QuantizedLinear
from hfcompress.quantization.w8a8 import byte_layer


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class SmoothQuant(ByteCodes):
    """Round weights and inputs to 8 bits, after moving large inputs into the weights (arXiv 2211.10438).

    strength: how much of the inputs' range the weights take over; 0 is none of it, 1 is all.
    scale: ``absmax`` takes it from a row's largest weights, ``mse`` the one with the smallest squared error.
    exclude: name patterns (``fnmatch``) of linear layers that stay as they are.
    """

    needs_calibration: ClassVar[bool] = True

    strength: Annotated[float, Field(ge=0, le=1)] = 0.5
    scale: Literal["absmax", "mse"] = "absmax"
    exclude: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """What the method does, for people."""
        return f"SmoothQuant, 8 bits for weights and inputs, strength {self.strength:g}"


def smoothing_scale(largest: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """Return by how much each input is divided (equation 4 of the paper), 1 on average.

    largest: (in,), the largest absolute input of each column.  weights: (out_i, in) each.  Returns (in,) float32.
    """
    columns = torch.stack([weight.detach().float().abs().amax(0) for weight in weights]).amax(0)
    scale = largest.clamp_min(1e-8).pow(strength) / columns.clamp_min(1e-8).pow(1 - strength)
    return around_one(torch.where((largest > 0) & (columns > 0), scale, torch.nan))


def smoothed(
    model: nn.Module,
    planned: Sequence[PlannedLinear],
    method: SmoothQuant,
    batches: Sequence[Mapping[str, Any]],
    changes: Changes,
    put: Callable[[str, nn.Module], None],
) -> Iterator[tuple[str, list[QuantizedLinear]]]:
    """Smooth and round layer by layer, on what each sees once the layers before it are quantized.

    changes: takes the values of what is folded.  put: puts a module in the place of another, by name.
    """
    by_name = {one.name: one for one in planned}
    count = 0
    for visit, found in observe_layers(model, by_name, batches, LayerVisit.largest_squares):
        largest = {name: one.squares.sqrt() for one in found for name in one.names}
        tokens = {name: one.tokens for one in found for name in one.names}
        for fold in folds_of(visit, set(tokens)):
            name = next(iter(fold.readers))
            weights = [reader.weight for reader in fold.readers.values()]
            fold_(fold, smoothing_scale(largest[name], weights, method.strength), changes)
            count += 1
        rows = []
        for name, seen in tokens.items():
            layer, row = byte_layer(by_name[f"{visit.name}.{name}"], "int", True, method.scale, seen)
            put(row.name, layer)
            rows.append(row)
        yield visit.name, rows
    if by_name and not count:
        warnings.warn(
            f"No norm of {type(model).__name__} feeds linear layers alone, so nothing was smoothed: this is "
            "RTN(bits=8, activations=8).",
            stacklevel=5,
        )
