"""The Gram matrix of a linear layer's inputs, which GPTQ and its kin call the Hessian."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

from hfcompress.calibration.integers import (
    NARROW_STRIP,
    TOKENS,
    RoundedRows,
    add_integer_cross_,
    add_integer_triangle_,
    integers_pay,
)
from hfcompress.devices import matrix_tiles, vector_bfloat16

# Rows of a triangle's strip; matrix tiles (AMX) want wider ones.
STRIP = 512 if matrix_tiles() else NARROW_STRIP
# Rows of activations whose squares are added up at once, which then stay in the cache.
SQUARED_ROWS = 512


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let oneDNN do float32 matrix products on the CPU; it may read operands as bfloat16, and adds up in float32.

    With matrix tiles (AMX) it does: about eight times faster, and exact for operands that hold bfloat16 values.  With
    AVX512_BF16 alone it multiplies them as they are, twice as fast as MKL, whose AVX512 is for Intel's CPUs.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def products_of(states: Tensor) -> AbstractContextManager[None]:
    """Return ``bfloat16_products`` where the CPU is made for it and float32 products of these states lose nothing."""
    whole = states.dtype == torch.bfloat16 if matrix_tiles() else float32_stays()
    return bfloat16_products() if whole and states.device.type == "cpu" else nullcontext()


@cache
def float32_stays() -> bool:
    """Tell whether oneDNN multiplies float32 matrices as they are where this CPU has instructions for bfloat16."""
    if not vector_bfloat16():
        return False
    one = torch.arange(1, 256 * 256 + 1, dtype=torch.float32, device="cpu").div_(7).frac_().view(256, 256)
    with bfloat16_products():
        found = one @ one
    return torch.allclose(found.double(), one.double() @ one.double(), rtol=1e-5, atol=0)


def accumulate_hessian_(hessian: Tensor, inputs: Tensor) -> None:
    """Add the Gram matrix of one batch (GPTQ, arXiv 2210.17323, section 3), not divided by the count of tokens.

    hessian: (in, in) float32, changed in place.  inputs: (tokens, in), padding already dropped.
    """
    rows = inputs.float()
    with products_of(inputs):
        hessian.addmm_(rows.T, rows)


def accumulate_triangle_(hessian: Tensor, inputs: Tensor) -> None:
    """Add the lower triangle of the Gram matrix of one batch; ``mirror_triangle_`` makes the sum whole at last.

    Done in strips of some rows, each up to its last diagonal element, so a little above the diagonal is added too: at
    1536 columns some 60% of all products, or 67% with wide strips.  Where integers are the fast way, inputs are
    rounded to them (see ``hfcompress.calibration.integers``).  Arguments as in ``accumulate_hessian_``.
    """
    accumulate_products_(hessian, inputs, [])


def accumulate_products_(hessian: Tensor, inputs: Tensor, crosses: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add the lower triangle of the Gram matrix of one batch, and products of what outputs lack and these inputs.

    crosses: each a sum (out, in) float32, changed in place, and the differences (tokens, out), which are rounded where
    the inputs are.  Other arguments as in ``accumulate_triangle_``.
    """
    for start in range(0, len(inputs), TOKENS):
        part = inputs[start : start + TOKENS]
        rounded = RoundedRows.of(part) if integers_pay(part) else None
        if rounded is None:
            _add_triangle_(hessian, part)
        else:
            add_integer_triangle_(hessian, rounded)
        for total, differences in crosses:
            lacking = differences[start : start + TOKENS]
            whole = None if rounded is None else RoundedRows.of(lacking)
            if rounded is not None and whole is not None:
                add_integer_cross_(total, whole, rounded)
                continue
            with products_of(part):
                total.addmm_(lacking.float().T, part.float())


def _add_triangle_(hessian: Tensor, inputs: Tensor) -> None:
    rows = inputs.float()
    with products_of(inputs):
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
        with products_of(hessian):
            product = matrix[:, :last] @ columns
        total += float(product.mul_(matrix[:, first:last]).sum(dtype=torch.float64))
    return total
