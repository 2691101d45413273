"""The Gram matrix of a linear layer's inputs, which GPTQ and its kin call the Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from hfcompress.calibration.integers import (
    NARROW_STRIP,
    TOKENS,
    add_integer_cross_,
    add_integer_triangle_,
    integers_pay,
)
from hfcompress.devices import matrix_tiles

# Rows of a triangle's strip; matrix tiles (AMX) want wider ones.
STRIP = 512 if matrix_tiles() else NARROW_STRIP
# Rows of activations whose squares are added up at once, which then stay in the cache.
SQUARED_ROWS = 512


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let float32 matrix products on the CPU read their operands as bfloat16 and add up in float32.

    Exact for operands that hold bfloat16 values, and about eight times faster on CPUs with matrix tiles (AMX).  oneDNN
    takes float32 operands that way there alone: with AVX512_BF16 it multiplies them as they are.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def products_of(states: Tensor) -> AbstractContextManager[None]:
    """Return ``bfloat16_products`` where the CPU is made for it and products of these states lose nothing."""
    exact = states.dtype == torch.bfloat16 and states.device.type == "cpu" and matrix_tiles()
    return bfloat16_products() if exact else nullcontext()


def accumulate_hessian_(hessian: Tensor, inputs: Tensor) -> None:
    """Add the Gram matrix of one batch (GPTQ, arXiv 2210.17323, section 3), not divided by the count of tokens.

    hessian: (in, in) float32, changed in place.  inputs: (tokens, in), padding already dropped.
    """
    rows = inputs.float()
    with products_of(inputs):
        hessian.addmm_(rows.T, rows)


def accumulate_triangle_(hessian: Tensor, inputs: Tensor) -> None:
    """Add the lower triangle of the Gram matrix of one batch; ``mirror_triangle_`` makes the sum whole at last.

    Done in strips of ``STRIP`` rows, each up to its last diagonal element, so a little above the diagonal is added
    too: at 1536 columns some 60% of all products, or 67% with wide strips.  Where integers are the fast way, inputs
    are rounded to them (see ``hfcompress.calibration.integers``).  Arguments as in ``accumulate_hessian_``.
    """
    for part in inputs.split(TOKENS):
        if integers_pay(part) and add_integer_triangle_(hessian, part):
            continue
        rows = part.float()
        with products_of(part):
            for first in range(0, len(hessian), STRIP):
                last = first + STRIP
                hessian[first:last, :last].addmm_(rows[:, first:last].T, rows[:, :last])


def mirror_triangle_(hessian: Tensor) -> Tensor:
    """Copy the lower triangle of a matrix (in, in) over the upper one, in place, and return the matrix."""
    for first in range(0, len(hessian), STRIP):
        last = min(first + STRIP, len(hessian))
        hessian[first:last, last:] = hessian[last:, first:last].T
        block = hessian[first:last, first:last]
        block.copy_(block.tril() + block.tril(-1).T)
    return hessian


def accumulate_cross_(total: Tensor, differences: Tensor, inputs: Tensor) -> None:
    """Add the product of what outputs lack and inputs, of one batch; rounded where the inputs' Gram matrix is.

    total: (out, in) float32, changed in place.  differences: (tokens, out).  inputs: (tokens, in).
    """
    for lacking, part in zip(differences.split(TOKENS), inputs.split(TOKENS)):
        if integers_pay(part) and add_integer_cross_(total, lacking, part):
            continue
        with products_of(part):
            total.addmm_(lacking.float().T, part.float())


def accumulate_squares_(squares: Tensor, inputs: Tensor) -> None:
    """Add the squares of one batch, column by column: the diagonal of its Gram matrix.

    squares: (in,) float32, changed in place.  inputs: (tokens, in), padding already dropped.
    """
    for rows in inputs.split(SQUARED_ROWS):
        squares.add_(rows.float().square().sum(0))


def keep_largest_squares_(squares: Tensor, inputs: Tensor) -> None:
    """Keep the largest square of each column, of those so far and of one batch.

    squares: (in,) float32, changed in place.  inputs: (tokens, in), padding already dropped.
    """
    if len(inputs):
        torch.maximum(squares, inputs.float().square().amax(0), out=squares)


def relative_error(weight: Tensor, changed: Tensor, hessian: Tensor | None = None) -> float:
    """Return sqrt(tr(D H D^T) / tr(W H W^T)) for D = the difference; without a Hessian the Frobenius norms' ratio.

    weight, changed: (out, in).  hessian: (in, in).  An all-zero weight has error 0.
    """
    weight = weight.float()
    error, size = (_energy(matrix, hessian) for matrix in (weight - changed.float(), weight))
    return (max(error, 0.0) / size) ** 0.5 if size > 0 else 0.0


def _energy(matrix: Tensor, hessian: Tensor | None) -> float:
    """Return tr(M H M^T) from the upper triangle of H.  matrix: (out, in) float32.  hessian: None is the identity."""
    if hessian is None:
        return float(matrix.square().sum(dtype=torch.float64))
    total = 0.0
    for first in range(0, len(hessian), STRIP):
        last = first + STRIP
        columns = hessian[:last, first:last].clone()
        columns[:first] *= 2  # what is left out below the diagonal
        total += float((matrix[:, :last] @ columns).mul_(matrix[:, first:last]).sum(dtype=torch.float64))
    return total
