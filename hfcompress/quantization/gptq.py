"""GPTQ: round column by column, and let later columns absorb the error (Frantar et al., arXiv 2210.17323).

Written in the LDLQ form (QuIP, arXiv 2307.13304, theorem 6), which takes the same steps with one Cholesky factor and
no inverse: with H = U D U^T, U unit upper triangular, column k rounds ``w_k + (W - Q)[:, :k] @ U[:k, k]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.errors import ModelError
from hfcompress.packed.packing import code_range
from hfcompress.quantization.grids import dequantized, relative_error, search_scale

CHANNEL_BLOCK = 128
INNER_BLOCK = 16
LARGEST_DAMPING = 10.0


@dataclass(frozen=True)
class GPTQResult:
    """codes: (out, in) int8.  scale: (out, groups) in the weight's dtype.  damping_used: share of the mean diagonal.

    relative_error: sqrt(tr(D H D^T) / tr(W H W^T)) with the Hessian as given, for D = W - codes * scale.
    """

    codes: Tensor
    scale: Tensor
    damping_used: float
    relative_error: float


@dataclass(frozen=True)
class HessianFactor:
    """H + damping * mean(diag H) * I = unit @ diag(strength) @ unit^T, with ``unit`` unit upper triangular.

    strength[k] weighs the squared rounding error of column k after compensation by the later ones.
    """

    unit: Tensor
    strength: Tensor
    damping: float


def factor_hessian(hessian: Tensor, damping: float) -> HessianFactor:
    """Factor a Hessian; one that cannot be factored is damped ten times more, up to ``LARGEST_DAMPING``.

    hessian: (in, in) float32.  damping: added to the diagonal, as a share of its mean.  Columns that saw only zeros
    get the mean as their diagonal, so they are rounded on their own. Raises ModelError when no damping helps.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ModelError("the Hessian holds NaN or infinite values, so the layer cannot be quantized with it.")
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if float(mean) <= 0:
        raise ModelError("the Hessian is zero: the layer saw only zeros, so there is nothing to calibrate on.")
    base = torch.where(diagonal > 0, diagonal, mean)
    share = damping
    while share <= LARGEST_DAMPING:
        damped = hessian.clone()
        damped.diagonal().copy_(base + share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed) and bool(torch.isfinite(lower).all()):
            upper = lower.flip(0, 1)
            root = upper.diagonal().clone()
            return HessianFactor(upper.div_(root), root.square(), share)
        share *= 10
    raise ModelError(
        f"the Hessian cannot be factored even with {share / 10:g} times its mean diagonal added, so it is no Gram "
        "matrix of real inputs. Check the calibration data, or use RTN for this layer."
    )


def gptq(weight: Tensor, hessian: Tensor, bits: int, group_size: int | None, damping: float = 0.01) -> GPTQResult:
    """Quantize one weight; see ``gptq_siblings``.

    weight: (out, in).  hessian: (in, in) float32, the Gram matrix of the inputs.
    """
    return gptq_siblings([weight], hessian, bits, group_size, damping)[0]


def gptq_siblings(
    weights: Sequence[Tensor], hessian: Tensor, bits: int, group_size: int | None, damping: float = 0.01
) -> list[GPTQResult]:
    """Quantize weights that see the same input, stacked into one: rows do not depend on each other.

    weights: (out_i, in) each, of one dtype.  hessian: (in, in) float32, not changed.  group_size: input columns that
    share a scale, a divisor of ``in``; None is all.  Zero weights stay zero and their rounding error is compensated.
    Raises ModelError when the Hessian cannot be factored.
    """
    dtype = weights[0].dtype
    stacked = torch.cat([weight.detach().float() for weight in weights])
    factor = factor_hessian(hessian, damping)
    codes, scale = round_columns(stacked, factor, bits, group_size, dtype)
    size = group_size or stacked.shape[1]
    quantized = dequantized(codes.view(len(codes), -1, size), scale.unsqueeze(-1), dtype).view_as(stacked)
    parts = (rows.split([len(weight) for weight in weights]) for rows in (codes, scale.to(dtype), stacked, quantized))
    return [
        GPTQResult(own_codes, own_scale, factor.damping, relative_error(before, after, hessian))
        for own_codes, own_scale, before, after in zip(*parts)
    ]


def round_columns(
    weight: Tensor,
    factor: HessianFactor,
    bits: int,
    group_size: int | None,
    dtype: torch.dtype,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Round a weight column by column, block by block.

    A group's scale is searched on its weights as earlier groups' errors have moved them; one scale per row is searched
    on the weights as they are.  weight: (out, in) float32.  dtype: of the stored scales.  scale: (out, groups) float32
    to use instead.  Returns codes (out, in) int8 and scale (out, groups) float32.
    """
    columns = weight.T.contiguous()
    zeros = columns == 0
    keep_zero = zeros if bool(zeros.any()) else None
    error, codes = torch.zeros_like(columns), torch.empty_like(columns, dtype=torch.int8)
    if group_size is None and scale is None:
        scale = search_scale(columns, factor.strength, bits, dtype).unsqueeze(1)
    chosen = []
    width = group_size or CHANNEL_BLOCK
    for start in range(0, len(columns), width):
        block = slice(start, min(start + width, len(columns)))
        target = columns[block].addmm(factor.unit[:start, block].T, error[:start])
        if keep_zero is not None:
            target.masked_fill_(keep_zero[block], 0)
        if scale is None:
            chosen.append(search_scale(target, factor.strength[block], bits, dtype))
        row_scale = chosen[-1] if scale is None else scale[:, start // group_size if group_size else 0].contiguous()
        zero = None if keep_zero is None else keep_zero[block]
        grid = _Grid(row_scale, *code_range(bits), dtype)
        _round_block_(target, columns[block], factor.unit[block, block], grid, zero, error[block], codes[block])
    return codes.T.contiguous(), torch.stack(chosen, dim=1) if scale is None else scale


@dataclass(frozen=True)
class _Grid:
    """The points that the columns of one block round to: scale (out,) times low .. high, as stored in ``dtype``."""

    scale: Tensor
    low: int
    high: int
    dtype: torch.dtype


def _round_block_(
    target: Tensor, weight: Tensor, unit: Tensor, grid: _Grid, zero: Tensor | None, error: Tensor, codes: Tensor
) -> None:
    """Round the columns of one block in place: ``error`` and ``codes`` are filled, ``target`` is used up.

    All but unit (width, width) and zero are (width, out).  target: the weights plus what earlier blocks' errors add.
    Errors reach the next ``INNER_BLOCK`` columns one by one and the others in one product, for less memory traffic.
    """
    rounded = torch.empty_like(target[0])
    for start in range(0, len(target), INNER_BLOCK):
        stop = min(start + INNER_BLOCK, len(target))
        for column in range(start, stop):
            torch.div(target[column], grid.scale, out=rounded).round_().clamp_(grid.low, grid.high)
            if zero is not None:
                rounded.masked_fill_(zero[column], 0)
            codes[column] = rounded
            torch.sub(weight[column], dequantized(rounded, grid.scale, grid.dtype), out=error[column])
            if column + 1 < stop:
                target[column + 1 : stop].addr_(unit[column, column + 1 : stop], error[column])
        if stop < len(target):
            target[stop:].addmm_(unit[start:stop, stop:].T, error[start:stop])
