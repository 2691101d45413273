"""GPTQ's loop over columns as a Triton kernel; import it only where Triton is installed.

Its twin is what ``GroupRounding`` does with ``in_turn_`` of ``hfcompress.calibration.columns``. Rows of a weight
do not depend on each other, so each program takes some of them through all columns of a run: the columns that are
not rounded yet stay in registers, and each column's error is added to them at once.  No GPU has run it so far; the
tests interpret it and compile it.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfcompress.packed.packing import code_range
from hfcompress.quantization.rounding import ColumnGrid

ROWS = 16  # of a program
# Bits of a float32 that are gone in a dtype with the same or a wider range for what a grid holds.
DROPPED = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


@triton.jit
def _round_run(
    target: tl.tensor, unit: tl.tensor, values: tl.tensor, error: tl.tensor, codes: tl.tensor,
    scale: tl.tensor, zero: tl.tensor, pruned: tl.tensor, columns: tl.tensor, rows: tl.tensor,
    scale_stride: tl.tensor, zero_stride: tl.tensor, low: tl.tensor, high: tl.tensor,
    AFFINE: tl.constexpr, PRUNED: tl.constexpr, DROPPED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    every = tl.arange(0, COLUMNS)
    tile = inside[None, :] & (every < columns)[:, None]
    rest = tl.load(target + every[:, None] * rows + row[None, :], mask=tile, other=0.0)
    for column in range(columns):
        at = column * rows + row
        here = tl.sum(tl.where(every[:, None] == column, rest, 0.0), axis=0)
        step = tl.load(scale + column * scale_stride + row, mask=inside, other=1.0)
        code = tl.div_rn(here, step)
        if AFFINE:
            shift = tl.load(zero + column * zero_stride + row, mask=inside, other=0.0)
            code += shift
        # 1.5 * 2**23 leaves no bit for a fraction: the sum is rounded to the nearest whole number, ties to even.
        code = tl.minimum(tl.maximum(code, low), high) + 12582912.0
        code -= 12582912.0
        if AFFINE:
            code -= shift
        if PRUNED:
            code = tl.where(tl.load(pruned + at, mask=inside, other=0) != 0, 0.0, code)
        now = code * step
        if DROPPED:
            # To nearest, ties to even, as a cast to the dtype and back.
            bits = now.to(tl.int32, bitcast=True)
            bits += (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)
            now = (bits & -(1 << DROPPED)).to(tl.float32, bitcast=True)
        lost = tl.load(values + at, mask=inside, other=0.0) - now
        if AFFINE:
            code += shift
        tl.store(codes + at, code.to(tl.int8), mask=inside)
        tl.store(values + at, now, mask=inside)
        tl.store(error + at, lost, mask=inside)
        later = tl.load(unit + column * columns + every, mask=(every > column) & (every < columns), other=0.0)
        rest += later[:, None] * lost[None, :]


def round_run_(
    target: Tensor,
    unit: Tensor,
    values: Tensor,
    error: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    pruned: Tensor | None,
    grid: ColumnGrid,
) -> None:
    """Round a run of columns to their grids; see ``Rounding``.

    scale, zero: (columns, out) float32, whose rows may lie anywhere.  codes: (columns, out) int8, is filled.
    """
    columns, rows = target.shape
    unit, pruned = unit.contiguous(), None if pruned is None else pruned.contiguous()
    assert all(one.is_contiguous() for one in (target, values, error, codes))
    assert all(one is None or one.stride(-1) == 1 for one in (scale, zero))
    low, high = code_range(grid.bits)
    # Triton launches on the current device, which need not be the one of a layer.
    with torch.cuda.device(target.device) if target.is_cuda else nullcontext():
        _round_run[(triton.cdiv(rows, ROWS),)](
            target, unit, values, error, codes, scale, scale if zero is None else zero,
            codes if pruned is None else pruned, columns, rows, scale.stride(0), 0 if zero is None else zero.stride(0),
            float(low), float(high),
            AFFINE=zero is not None, PRUNED=pruned is not None, DROPPED=DROPPED[grid.dtype],
            COLUMNS=max(16, triton.next_power_of_2(columns)), ROWS=ROWS, enable_fp_fusion=False,
        )  # fmt: skip
