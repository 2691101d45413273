"""The Cholesky factor of a Hessian, which tells how later columns absorb the error made in earlier ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.errors import ModelError

LARGEST_DAMPING = 10.0


@dataclass(frozen=True)
class HessianFactor:
    """H + damping * mean(diag H) * I = unit @ diag(strength) @ unit^T, with ``unit`` unit upper triangular.

    strength[k] weighs the squared error of column k after compensation by the later ones; it is the inverse of the
    squared diagonal of the upper Cholesky factor of H^-1.  dead: (in,) bool, the columns that saw only zeros.
    """

    unit: Tensor
    strength: Tensor
    damping: float
    dead: Tensor

    def solve(self, right: Tensor) -> Tensor:
        """Return the solution X of X H = right for the damped H.  right: (out, in) float32."""
        halfway = torch.linalg.solve_triangular(self.unit.T, right, upper=False, left=False, unitriangular=True)
        halfway /= self.strength
        return torch.linalg.solve_triangular(self.unit, halfway, upper=True, left=False, unitriangular=True)


def factor_hessian(hessian: Tensor, damping: float) -> HessianFactor:
    """Factor a Hessian; one that cannot be factored is damped ten times more, up to ``LARGEST_DAMPING``.

    hessian: (in, in) float32.  damping: added to the diagonal, as a share of its mean.  Columns that saw only zeros
    get the mean as their diagonal, so they are on their own. Raises ModelError when no damping helps.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ModelError("the Hessian holds NaN or infinite values, so the layer cannot be compressed with it.")
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if float(mean) <= 0:
        raise ModelError("the Hessian is zero: the layer saw only zeros, so there is nothing to calibrate on.")
    dead = diagonal == 0
    base = torch.where(diagonal > 0, diagonal, mean)
    share = damping
    while share <= LARGEST_DAMPING:
        flipped = hessian.flip(0, 1)
        flipped.diagonal().copy_((base + share * mean).flip(0))
        lower, failed = torch.linalg.cholesky_ex(flipped)
        del flipped  # each of these is as large as the Hessian
        # What is not finite in a row makes the end of the row, on the diagonal, not finite, too.
        if not int(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            upper = lower.flip(0, 1)
            root = upper.diagonal().clone()
            return HessianFactor(upper.div_(root), root.square(), share, dead)
        share *= 10
    raise ModelError(
        f"the Hessian cannot be factored even with {share / 10:g} times its mean diagonal added, so it is no Gram "
        "matrix of real inputs. Check the calibration data, or leave this layer out."
    )
