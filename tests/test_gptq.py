"""GPTQ's blocked loop is the textbook's, never worse than rounding to nearest, and safe on odd Hessians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hfcompress.calibration import factor_hessian
from hfcompress.calibration.hessian import relative_error
from hfcompress.errors import ModelError
from hfcompress.packed import code_range
from hfcompress.quantization.gptq import GPTQResult, gptq, gptq_siblings, round_columns
from hfcompress.quantization.grids import (
    SHRINK_FACTORS,
    absmax_scale,
    affine_grid,
    search_affine,
    search_scale,
    storable_scale,
)
from hfcompress.quantization.rtn import round_to_nearest

GRIDS = [(2, 32), (3, 16), (4, 8), (4, 32), (4, None), (8, None)]


def problem(rows: int = 24, columns: int = 192, seed: int = 0, tokens: int = 600) -> tuple[Tensor, Tensor]:
    """Return a weight and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator) * 0.02, inputs.T @ inputs


def values(codes: Tensor, scale: Tensor, group_size: int | None) -> Tensor:
    grouped = codes.to(scale.dtype).view(len(codes), -1, group_size or codes.shape[1])
    return (grouped * scale.unsqueeze(-1)).view(codes.shape)


def hessian_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    difference = (weight - quantized).double()
    return float((difference @ hessian.double()).mul(difference).sum())


def textbook_gptq(weight: Tensor, hessian: Tensor, bits: int, scale: Tensor, size: int, damping: float) -> Tensor:
    """Frantar et al.'s algorithm 1 in float64, one column at a time, with the inverse's Cholesky factor."""
    return textbook_columns(weight, hessian, bits, scale, size, damping, weight.shape[1])[0]


def textbook_columns(
    weight: Tensor, hessian: Tensor, bits: int, scale: Tensor, size: int, damping: float, count: int
) -> tuple[Tensor, Tensor]:
    """Round the first columns alone; return all codes, and the weights (out, in) float64 as these have moved them."""
    low, high = code_range(bits)
    rest, damped = weight.double().clone(), hessian.double().clone()
    damped.diagonal().add_(damping * damped.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    codes = torch.zeros_like(rest)
    for column in range(count):
        step = scale[:, column // size].double()
        codes[:, column] = (rest[:, column] / step).round().clamp(low, high)
        error = (rest[:, column] - codes[:, column] * step) / inverse[column, column]
        rest[:, column:] -= error[:, None] * inverse[column, column:]
    return codes.to(torch.int8), rest


@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
def test_blocked_loop_equals_the_textbook_column_by_column(bits: int, group_size: int | None) -> None:
    weight, hessian = problem()
    size = group_size or weight.shape[1]
    # Less than absmax, so that the largest weight of a group is not exactly between two codes.
    scale = 0.93 * absmax_scale(weight.view(len(weight), -1, size), bits, torch.float32).squeeze(-1)
    expected = textbook_gptq(weight, hessian, bits, scale, size, damping=0.01)
    codes, _ = round_columns(weight, factor_hessian(hessian, 0.01), bits, group_size, torch.float32, scale)
    assert torch.equal(codes, expected)


def test_a_groups_scale_is_searched_on_the_weights_as_errors_before_it_have_moved_them() -> None:
    weight, hessian = problem()
    result = gptq(weight, hessian, 3, 32, damping=0.01)
    codes, moved = textbook_columns(weight, hessian, 3, result.scale, 32, 0.01, count=32)
    same = (codes[:, :32] == result.codes[:, :32]).all(1)  # a tie may flip between float32 and float64
    assert float(same.float().mean()) > 0.9
    importance = factor_hessian(hessian, 0.01).strength[32:64]
    expected, static = (
        search_scale(columns[:, 32:64].T.float().contiguous(), importance, 3, torch.float32)
        for columns in (moved, weight)
    )
    found = result.scale[:, 1]
    assert bool(torch.isclose(found, expected, rtol=1e-4)[same].all())
    assert not bool(torch.isclose(found, static, rtol=1e-4).any())


def test_the_factor_rebuilds_the_damped_hessian() -> None:
    _, hessian = problem()
    factor = factor_hessian(hessian, 0.05)
    rebuilt = factor.unit.double() * factor.strength.double() @ factor.unit.double().T
    damped = hessian.double() + 0.05 * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    torch.testing.assert_close(rebuilt, damped, rtol=1e-4, atol=1e-5 * float(damped.max()))
    assert torch.equal(factor.unit.tril(-1), torch.zeros_like(hessian))
    assert torch.equal(factor.unit.diagonal(), torch.ones(len(hessian)))
    assert factor.damping == 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
def test_layer_error_is_below_that_of_rounding_to_nearest(
    bits: int, group_size: int | None, dtype: torch.dtype
) -> None:
    weight, hessian = problem()
    weight = weight.to(dtype)
    result = gptq(weight, hessian, bits, group_size)
    nearest = values(*round_to_nearest(weight, bits, group_size)[:2], group_size)
    ours = values(result.codes, result.scale, group_size)
    assert hessian_error(weight, ours, hessian) < hessian_error(weight, nearest, hessian)
    own = math.sqrt(hessian_error(weight, ours, hessian) / hessian_error(weight, torch.zeros_like(weight), hessian))
    assert result.relative_error == pytest.approx(own, rel=1e-3)
    assert result.scale.dtype == dtype
    assert result.damping_used == 0.01


def test_scales_are_rounded_to_their_dtype_before_codes_are_chosen() -> None:
    weight, hessian = problem()
    low = gptq(weight.bfloat16(), hessian, 4, 32)
    scale = low.scale.float()
    codes, _ = round_columns(weight.bfloat16().float(), factor_hessian(hessian, 0.01), 4, 32, torch.bfloat16, scale)
    assert torch.equal(scale.bfloat16().float(), scale)
    assert torch.equal(codes, low.codes)


@pytest.mark.parametrize("group_size", [32, None])
def test_siblings_in_one_call_equal_calls_of_their_own(group_size: int | None) -> None:
    weight, hessian = problem(rows=30)
    parts = weight.split([16, 6, 8])
    together = gptq_siblings(parts, hessian, 4, group_size)
    for part, result in zip(parts, together, strict=True):
        alone: GPTQResult = gptq(part, hessian, 4, group_size)
        assert (result.codes != alone.codes).float().mean() < 0.002  # sums in another order may flip a tie
        assert result.relative_error == pytest.approx(alone.relative_error, rel=1e-2)


@pytest.mark.parametrize("group_size", [32, None])
def test_zeros_of_a_pruned_weight_stay_and_their_error_is_compensated(group_size: int | None) -> None:
    weight, hessian = problem()
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    weight = weight * keep
    result = gptq(weight, hessian, 3, group_size)
    assert torch.equal(result.codes[~keep], torch.zeros_like(result.codes[~keep]))
    assert float((result.codes[keep] != 0).float().mean()) > 0.5
    nearest = values(*round_to_nearest(weight, 3, group_size)[:2], group_size)
    ours = values(result.codes, result.scale, group_size)
    assert hessian_error(weight, ours, hessian) < 0.8 * hessian_error(weight, nearest, hessian)


def test_dead_columns_are_rounded_on_their_own_and_do_not_disturb_others() -> None:
    weight, hessian = problem()
    dead = torch.zeros(weight.shape[1], dtype=torch.bool)
    dead[[3, 70, 71, 191]] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    result = gptq(weight, hessian, 8, 32)
    ours = values(result.codes, result.scale, 32)
    step = result.scale.repeat_interleave(32, dim=1)
    assert bool(((weight - ours)[:, dead].abs() <= 0.5001 * step[:, dead]).all())
    live = gptq(weight.masked_fill(dead, 0), hessian, 8, None)
    assert result.relative_error < 2 * live.relative_error


def test_a_hessian_that_is_not_positive_definite_is_damped_more_and_says_so() -> None:
    weight, hessian = problem()
    mean = hessian.diagonal().mean()
    vectors = torch.linalg.qr(torch.randn(192, 192, generator=torch.Generator().manual_seed(0)))[0]
    spectrum = torch.full((192,), float(mean))
    spectrum[0] = -0.3 * float(mean)
    broken = vectors @ torch.diag(spectrum) @ vectors.T
    result = gptq(weight, (broken + broken.T) / 2, 4, 32, damping=0.01)
    assert result.damping_used == pytest.approx(1.0)
    assert bool(torch.isfinite(result.scale).all())


def test_fewer_tokens_than_columns_are_no_obstacle() -> None:
    weight, hessian = problem(tokens=10)
    result = gptq(weight, hessian, 4, 32)
    assert result.relative_error < relative_error(weight, values(*round_to_nearest(weight, 4, 32)[:2], 32), hessian)


def test_hopeless_hessians_are_refused() -> None:
    weight, hessian = problem()
    indefinite = hessian - 40 * hessian.diagonal().mean() * torch.ones_like(hessian)
    indefinite.diagonal().copy_(hessian.diagonal())
    with pytest.raises(ModelError, match="cannot be factored even with 10 times its mean diagonal"):
        gptq(weight, indefinite, 4, 32)
    with pytest.raises(ModelError, match="saw only zeros"):
        gptq(weight, torch.zeros_like(hessian), 4, 32)
    hessian[0, 0] = torch.nan
    with pytest.raises(ModelError, match="holds NaN"):
        gptq(weight, hessian, 4, 32)


@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
def test_rounding_to_nearest_is_within_half_a_step(bits: int, group_size: int | None) -> None:
    """But for values that only the code above the highest would reach, on the side that has one code less."""
    weight, _ = problem()
    codes, scale, _ = round_to_nearest(weight, bits, group_size)
    low, high = code_range(bits)
    assert low <= int(codes.min()) <= int(codes.max()) <= high
    step = scale.repeat_interleave(group_size or weight.shape[1], dim=1)
    error = (weight - values(codes, scale, group_size)) / step
    clipped = (weight / step > high + 0.5001) & (codes == high)
    assert bool((error.abs() <= 0.5001)[~clipped].all())
    assert bool((error[clipped] < 1.0001).all())
    assert bool(clipped.any()) == (bits < 8)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_groups_largest_weight_gets_the_lowest_code_whatever_its_sign(bits: int) -> None:
    weight, _ = problem()
    codes, scale, _ = round_to_nearest(weight, bits, 32)
    groups = weight.view(-1, 32)
    largest = groups.abs().argmax(1, keepdim=True)
    assert bool((codes.view(-1, 32).gather(1, largest) == code_range(bits)[0]).all())
    assert torch.equal(scale.flatten() < 0, groups.gather(1, largest).flatten() > 0)
    assert torch.equal(values(codes, scale, 32).view(-1, 32).gather(1, largest), groups.gather(1, largest))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_of_either_sign_lose_less_than_positive_ones(bits: int) -> None:
    weight, _ = problem(rows=200)
    columns, alike = weight.T[:32].contiguous(), torch.ones(32)
    low, high = code_range(bits)

    def error(scale: Tensor) -> Tensor:
        return ((columns / scale).round().clamp(low, high) * scale - columns).square().sum(0)

    widest = columns.abs().amax(0) / ((2**bits - 1) / 2)
    positive = torch.stack([error(widest * factor) for factor in SHRINK_FACTORS]).amin(0)
    assert float(error(search_scale(columns, alike, bits, torch.float32)).sum()) < 0.93 * float(positive.sum())


def test_scales_of_eight_bits_are_positive() -> None:
    """As engines of 8-bit products expect them."""
    weight, _ = problem()
    assert bool((round_to_nearest(weight, 8, None).scale > 0).all())
    assert bool((round_to_nearest(weight, 8, None, scale="mse").scale > 0).all())


def test_zero_groups_and_zero_weights_round_to_zero() -> None:
    weight, _ = problem()
    weight[:, :32] = 0
    weight[5, 100] = 0
    codes, scale, _ = round_to_nearest(weight, 4, 32)
    assert not codes[:, :32].any()
    assert codes[5, 100] == 0
    assert bool((scale[:, 0] == 1).all())
    assert gptq(weight, problem()[1], 4, 32).codes[:, :32].abs().max() == 0


def test_searched_scales_are_the_best_of_their_grid_and_beat_absmax() -> None:
    weight, hessian = problem()
    columns, importance = weight.T[:32].contiguous(), hessian.diagonal()[:32].clone()

    def error(scale: Tensor) -> Tensor:
        codes = (columns / scale).round().clamp(-8, 7)
        return importance @ (codes * scale - columns).square()

    best = search_scale(columns, importance, 4, torch.float32)
    widest = absmax_scale(weight[:, :32], 4, torch.float32).squeeze(1)
    assert bool((error(best) <= error(widest) * 1.0001).all())
    assert float(error(best).sum()) < 0.97 * float(error(widest).sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_row_gets_the_best_factor_however_many_are_searched_at_once(
    symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = problem()
    columns, importance = weight.T[:32].contiguous(), hessian.diagonal()[:32].clone()
    columns[:, 3] = 0
    low, high = code_range(3)
    errors, scales = [], []
    for factor in SHRINK_FACTORS:
        if symmetric:
            scale = storable_scale(factor * absmax_scale(columns, 3, torch.float32, dim=0).squeeze(0), torch.bfloat16)
            zero = torch.zeros_like(scale)
        else:
            scale, zero = affine_grid(factor * columns, 3, torch.bfloat16)
        codes = ((columns / scale).round() if symmetric else (columns / scale + zero).round()).clamp(low, high) - zero
        errors.append(importance.double() @ (codes.double() * scale.double() - columns.double()).square())
        scales.append(scale)
    smallest = torch.stack(errors).amin(0)
    found = []
    for at_once in (1 << 21, 5 * 32):
        monkeypatch.setattr("hfcompress.quantization.grids.SEARCHED", at_once)
        if symmetric:
            found.append(search_scale(columns, importance, 3, torch.bfloat16))
        else:
            found.append(search_affine(columns, importance, 3, torch.bfloat16)[0])
    assert torch.equal(*found)
    chosen = torch.stack(errors).gather(0, (torch.stack(scales) == found[0]).int().argmax(0, keepdim=True)).squeeze(0)
    assert bool((torch.stack(scales) == found[0]).any(0).all())
    torch.testing.assert_close(chosen, smallest, rtol=1e-4, atol=0)
    assert found[0][3] == 1  # of a row of zeros


def test_scales_are_never_zero_in_their_dtype() -> None:
    scale = storable_scale(torch.tensor([0.0, 1e-30, -1e-30, 0.1]), torch.float16)
    assert scale[0] == 1
    assert scale[1] == -scale[2] == torch.finfo(torch.float16).tiny
    assert torch.equal(scale.half().float(), scale)


def test_relative_error_of_nothing_is_zero() -> None:
    assert relative_error(torch.zeros(2, 3), torch.zeros(2, 3)) == 0.0
    assert relative_error(torch.ones(2, 3), torch.zeros(2, 3)) == pytest.approx(1.0)
