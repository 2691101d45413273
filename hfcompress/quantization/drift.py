"""Goals for rounding that make up for what the quantized model lacks already.

The linear layers have to be taken one after another for that, each on what the quantized ones before it give.
``benchmarks/quantize.py`` measures the gain (``quality="best"`` beside ``"fast"``).
"""

from __future__ import annotations

from torch import Tensor

from hfcompress.calibration import factor_hessian

# Of the Hessian's mean diagonal.
DAMPING = 0.05


def correct_drift(weight: Tensor, hessian: Tensor, missing: Tensor | None) -> Tensor:
    """Return the weight that makes up for what its output lacks, as far as its inputs tell.

    The least-squares solution of W' x = W x + lack over all tokens, drawn towards W by ``DAMPING`` of the Hessian's
    mean diagonal.  weight: (out, in).  hessian: (in, in) float32.  missing: (out, in) float32, the sum over tokens of
    lack times input; None is nothing.  Returns (out, in) float32.
    """
    dense = weight.detach().float()
    return dense if missing is None else dense + factor_hessian(hessian, DAMPING).solve(missing)
