"""The Gram matrix of a linear layer's inputs, which GPTQ and its kin call the Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hfcompress.devices import fast_bfloat16


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let float32 matrix products on the CPU read their operands as bfloat16 and add up in float32.

    Exact for operands that hold bfloat16 values, and about eight times faster where the CPU has such instructions.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def accumulate_hessian_(hessian: Tensor, inputs: Tensor) -> None:
    """Add the Gram matrix of one batch (GPTQ, arXiv 2210.17323, section 3), not divided by the count of tokens.

    hessian: (in, in) float32, changed in place.  inputs: (tokens, in), padding already dropped.
    """
    rows = inputs.float()
    if inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu" and fast_bfloat16("cpu"):
        with bfloat16_products():
            hessian.addmm_(rows.T, rows)
    else:
        hessian.addmm_(rows.T, rows)


def accumulate_squares_(squares: Tensor, inputs: Tensor) -> None:
    """Add the squares of one batch, column by column: the diagonal of its Gram matrix.

    squares: (in,) float32, changed in place.  inputs: (tokens, in), padding already dropped.
    """
    squares.add_(inputs.float().square().sum(0))


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
    difference = weight - changed.float()
    error, size = (
        float((matrix if hessian is None else matrix @ hessian).mul(matrix).sum(dtype=torch.float64))
        for matrix in (difference, weight)
    )
    return (max(error, 0.0) / size) ** 0.5 if size > 0 else 0.0
