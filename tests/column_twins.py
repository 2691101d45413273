"""Checks of GPTQ's Triton kernel against the loop in PyTorch, for Triton's interpreter and for GPUs.

``pytest tests/column_twins.py`` with ``TRITON_INTERPRET=1`` runs them on the CPU; ``test_column_kernel`` does that.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from hfcompress.calibration.columns import compress_columns
from hfcompress.calibration.factor import HessianFactor
from hfcompress.pruning.oneshot import SparseGPT
from hfcompress.quantization import rounding
from hfcompress.quantization.gptq import gptq_siblings
from hfcompress.quantization.options import Steps
from hfcompress.quantization.rounding import ColumnGrid, FixedScales, GroupRounding
from tests.test_gptq import problem

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
GRIDS = [
    (2, 32, True, torch.float32),
    (3, 16, False, torch.bfloat16),
    (4, 8, True, torch.bfloat16),
    (4, 64, True, torch.float16),
    (4, None, False, torch.float32),
    (8, 160, False, torch.float32),
]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the kernel run, and return how many columns each of its calls takes."""
    from hfcompress.quantization import column_kernel

    calls: list[int] = []
    real = column_kernel.round_run_

    def counted(target: Tensor, *rest: object) -> None:
        calls.append(len(target))
        real(target, *rest)

    monkeypatch.setattr(column_kernel, "round_run_", counted)
    if DEVICE == "cpu":  # the interpreter takes as long for a program of many rows as for one of a few
        monkeypatch.setattr(column_kernel, "ROWS", 32)
    monkeypatch.setattr(rounding, "kernel_runs_on", lambda device: True)
    return calls


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "kernel_runs_on", lambda device: False)


@pytest.mark.parametrize(
    ("dtype", "symmetric", "prunes"),
    [
        (torch.float32, True, False),
        (torch.float32, False, True),
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, False),
        (torch.float16, True, True),
        (torch.float16, False, False),
    ],
)
def test_sums_that_no_order_changes_give_the_same_bits(
    dtype: torch.dtype, symmetric: bool, prunes: bool, kernel: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All numbers are multiples of 1/512 and below 2**15, so float32 holds every sum exactly."""
    generator = torch.Generator().manual_seed(0)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    rows, columns = 40, 140
    weight = whole(-256, 257, rows, columns) / 64
    unit = whole(-1, 2, columns, columns) * (whole(0, 30, columns, columns) == 0)
    unit = unit.triu(1) + torch.eye(columns)
    weight = weight.masked_fill(whole(0, 3, rows, columns) == 0, 0) if prunes else weight
    strength, dead = torch.ones(columns), torch.zeros(columns, dtype=torch.bool)
    factor = HessianFactor(*(one.to(DEVICE) for one in (unit, strength)), 0.01, dead.to(DEVICE))
    # Products of eight bits and a code are too long for a half, powers of two put many weights just between two codes.
    scales = [one.to(DEVICE) for one in (2.0 ** whole(-3, 0, rows), whole(128, 256, rows) / 512)]
    zeros = [None if symmetric else whole(-3, 4, rows).to(DEVICE) for _ in scales]
    places = torch.randint(2, (columns,), generator=generator)
    weight = weight.to(DEVICE)
    grid = ColumnGrid(4, None, dtype, symmetric)
    found = []
    for plain in (False, True):
        if plain:
            plainly(monkeypatch)
        work = GroupRounding(weight, factor.strength, grid, FixedScales(scales, zeros, places))
        values = compress_columns(weight, factor, None, work, zeros=(weight == 0) if prunes else None)
        found.append((values, work.codes))
    assert float((weight - found[0][0]).abs().max()) < 2**8  # so that sums stay far below 2**15
    assert kernel == [128, 12]
    for ours, twin in zip(*found, strict=True):
        assert torch.equal(ours, twin)
    assert float(found[0][1].float().std()) > 2
    assert not prunes or not found[0][0][weight == 0].any()


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "dtype"), GRIDS)
def test_the_kernel_gives_what_the_loop_gives(
    bits: int,
    group_size: int | None,
    symmetric: bool,
    dtype: torch.dtype,
    kernel: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums in another order may put a weight on the other side of a tie; its row then goes on from there."""
    weight, hessian = problem(rows=24, columns=160)
    weight[:, 5:9] = 0
    weight = weight.to(DEVICE, dtype)
    hessian = hessian.to(DEVICE)
    (ours,) = gptq_siblings([weight], hessian, bits, group_size, symmetric=symmetric)
    assert sum(kernel) == 160
    assert max(kernel) == min(group_size or 128, 128)
    plainly(monkeypatch)
    (twin,) = gptq_siblings([weight], hessian, bits, group_size, symmetric=symmetric)
    same = (ours.codes == twin.codes).all(1)
    assert float(same.float().mean()) > 0.9
    torch.testing.assert_close(ours.scale[same], twin.scale[same], rtol=1e-6, atol=0)
    assert ours.relative_error == pytest.approx(twin.relative_error, rel=1e-2)
    assert ours.zero_point is None or torch.equal(ours.zero_point[same], twin.zero_point[same])


@pytest.mark.parametrize("order", ["stored", "groups"])
def test_orders_and_sweeps_go_with_the_kernel(order: str, kernel: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = (one.to(DEVICE) for one in problem(rows=20, columns=96))
    steps = Steps(order=order, sweeps=1)
    (ours,) = gptq_siblings([weight], hessian, 3, 32, steps=steps)
    assert kernel == [32, 32, 32]
    plainly(monkeypatch)
    (twin,) = gptq_siblings([weight], hessian, 3, 32, steps=steps)
    assert float((ours.codes == twin.codes).all(1).float().mean()) > 0.8
    assert ours.relative_error == pytest.approx(twin.relative_error, rel=1e-2)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_kernel_goes_with_pruning(pattern: str | None, kernel: list[int]) -> None:
    weight, hessian = (one.to(DEVICE) for one in problem(rows=20, columns=96))
    (both,) = gptq_siblings([weight], hessian, 3, 32, prune=SparseGPT(0.5, pattern))
    assert float((both.codes == 0).float().mean()) >= 0.5
    # Where weights are chosen between columns it takes those that are chosen from together.
    assert kernel == ([4] * 24 if pattern else [32] * 3) + [32] * 3


def test_one_row_is_enough(kernel: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = (one.to(DEVICE) for one in problem(rows=1, columns=24))
    hessian = torch.diag(hessian.diagonal())  # no error reaches another column
    (ours,) = gptq_siblings([weight], hessian, 4, 8)
    plainly(monkeypatch)
    (twin,) = gptq_siblings([weight], hessian, 4, 8)
    assert torch.equal(ours.codes, twin.codes)
