"""Goals for rounding that make up for what the quantized model lacks already.

The linear layers have to be taken one after another for that, each on what the quantized ones before it give.
``benchmarks/quantize.py`` measures the gain (``quality="best"`` beside ``"fast"``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from hfcompress.calibration import factor_hessian

# Of the Hessian's mean diagonal. With less, the correction fits the calibration rows more than others.
DAMPING = 0.3


class Corrected(NamedTuple):
    """Weights (out_i, in) float32, and the damping that the Hessian needed; 0 where nothing was missing."""

    weights: list[Tensor]
    damping_used: float


def correct_drift(weights: Sequence[Tensor], hessian: Tensor, missing: Sequence[Tensor | None]) -> Corrected:
    """Return the weights that make up for what their outputs lack, as far as their inputs tell.

    The least-squares solution of W' x = W x + lack over all tokens, drawn towards W by ``DAMPING`` of the Hessian's
    mean diagonal, or by more where that cannot be factored.  weights: (out_i, in), of layers that see the same input.
    hessian: (in, in) float32.  missing: (out_i, in) float32 each, the sum over tokens of lack times input; None is
    nothing.
    """
    dense = [weight.detach().float() for weight in weights]
    if all(lack is None for lack in missing):
        return Corrected(dense, 0.0)
    factor = factor_hessian(hessian, DAMPING)
    corrected = [one if lack is None else one + factor.solve(lack) for one, lack in zip(dense, missing)]
    return Corrected(corrected, factor.damping)
