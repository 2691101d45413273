"""What comes after GPTQ's loop never loses anything, and its order and scales are what they are called."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hfcompress.calibration import factor_hessian
from hfcompress.packed import code_range, packed_layers
from hfcompress.pruning.oneshot import SparseGPT
from hfcompress.quantization import GPTQ, quantize
from hfcompress.quantization.gptq import gptq_siblings
from hfcompress.quantization.grids import Rounded, absmax_scale, search_affine, search_scale
from hfcompress.quantization.options import Steps
from hfcompress.quantization.order import column_order, group_order
from hfcompress.quantization.refine import refine
from tests.families import FAMILIES, inputs_of
from tests.test_gptq import hessian_error, problem, textbook_gptq
from tests.test_quantization_grids import values

pytestmark = pytest.mark.usefixtures("few_tokens_are_fine")


def pruned(weight: Tensor, share: float = 0.5) -> Tensor:
    return weight * (torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) > share)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("prunes", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 16), (4, 64), (4, None), (8, 32)])
def test_no_sweep_ever_makes_a_row_worse(
    bits: int, group_size: int | None, symmetric: bool, prunes: bool, seed: int
) -> None:
    weight, hessian = problem(seed=seed)
    weight = pruned(weight) if prunes else weight
    (plain,) = gptq_siblings([weight], hessian, bits, group_size, symmetric=symmetric)
    rounded, errors = plain.rounded, [row_errors(weight, values(plain.rounded), hessian)]
    for _ in range(3):
        rounded, found = refine(weight, hessian, rounded, bits, torch.float32, weight == 0, 1)
        torch.testing.assert_close(found, values(rounded))
        errors.append(row_errors(weight, found, hessian))
    for before, after in pairwise(errors):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert float(errors[-1].sum()) < 0.97 * float(errors[0].sum())
    assert not values(rounded)[weight == 0].any()
    low, high = code_range(bits)
    assert low <= int(rounded.codes.min()) <= int(rounded.codes.max()) <= high
    assert torch.equal(rounded.scale > 0, plain.rounded.scale > 0)
    assert bool((rounded.scale != 0).all())


def row_errors(weight: Tensor, changed: Tensor, hessian: Tensor) -> Tensor:
    difference = (weight - changed).double()
    return (difference @ hessian.double()).mul(difference).sum(1)


def textbook_sweep(weight: Tensor, hessian: Tensor, rounded: Rounded, bits: int) -> tuple[Tensor, Tensor]:
    """Every code to the best of all that there are, then its group's scale by least squares; float64, row by row."""
    low, high = code_range(bits)
    codes, scale = rounded.codes.double(), rounded.scale.double()
    size = codes.shape[1] // scale.shape[1]
    root = torch.linalg.cholesky(hessian.double())
    for row in range(len(codes)):
        for group in range(scale.shape[1]):
            block = slice(group * size, (group + 1) * size)
            for column in range(block.start, block.stop):
                tries = codes[row].repeat(high - low + 1, 1)
                tries[:, column] = torch.arange(low, high + 1)
                lost = ((tries * scale[row].repeat_interleave(size) - weight[row]) @ root).square().sum(1)
                codes[row] = tries[lost.argmin()]
            rest = codes[row] * scale[row].repeat_interleave(size)
            rest[block] = 0
            direction = codes[row, block] @ root[block]
            if direction.any():
                scale[row, group] = (weight[row] - rest) @ root @ direction / (direction @ direction)
    return codes, scale


@pytest.mark.parametrize(("bits", "group_size"), [(2, 8), (3, 16), (4, 8)])
def test_a_sweep_is_the_textbooks(bits: int, group_size: int) -> None:
    weight, hessian = problem(rows=4, columns=32)
    (plain,) = gptq_siblings([weight], hessian, bits, group_size)
    codes, scale = textbook_sweep(weight, hessian, plain.rounded, bits)
    ours, _ = refine(weight, hessian, plain.rounded, bits, torch.float32, weight == 0, 1)
    assert torch.equal(ours.codes.double(), codes)
    torch.testing.assert_close(ours.scale.double(), scale, rtol=1e-4, atol=1e-9)


def test_scales_are_refitted_as_they_are_stored() -> None:
    weight, hessian = problem()
    low = weight.bfloat16()
    (plain,) = gptq_siblings([low], hessian, 3, 32)
    (swept,) = gptq_siblings([low], hessian, 3, 32, steps=Steps(sweeps=2))
    assert swept.scale.dtype == torch.bfloat16
    stored = (swept.codes.bfloat16().view(24, -1, 32) * swept.scale.unsqueeze(-1)).view(24, -1)
    before = (plain.codes.bfloat16().view(24, -1, 32) * plain.scale.unsqueeze(-1)).view(24, -1)
    assert hessian_error(low, stored, hessian) < 0.97 * hessian_error(low, before, hessian)
    assert swept.relative_error < plain.relative_error


def test_columns_that_saw_only_zeros_keep_their_codes() -> None:
    weight, hessian = problem()
    hessian[:, 40:44] = hessian[40:44] = 0
    (plain,) = gptq_siblings([weight], hessian, 4, 32)
    refined, found = refine(weight, hessian, plain.rounded, 4, torch.float32, weight == 0, 2)
    assert torch.equal(refined.codes[:, 40:44], plain.codes[:, 40:44])
    assert bool(torch.isfinite(found).all())


def test_important_groups_and_columns_come_first_and_groups_stay_whole() -> None:
    importance = torch.tensor([1.0, 3.0, 9.0, 5.0, 2.0, 8.0])
    columns, groups = group_order(importance, 2)
    assert columns.tolist() == [2, 3, 5, 4, 1, 0]
    assert groups.tolist() == [1, 2, 0]
    assert group_order(importance, None)[0].tolist() == [2, 5, 3, 1, 4, 0]
    for size in (2, None):
        assert column_order(importance, size)[0].tolist() == [2, 5, 3, 1, 4, 0]


def uneven_problem() -> tuple[Tensor, Tensor]:
    """Return a weight, in whose last rows some are zero, and a Hessian of inputs of very different size."""
    weight, hessian = problem()
    scales = torch.linspace(0.2, 3, 192)[torch.randperm(192, generator=torch.Generator().manual_seed(2))]
    weight[16:] = pruned(weight[16:], 0.2)
    return weight, hessian * scales * scales.unsqueeze(1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
def test_another_order_is_undone_in_what_is_stored(group_size: int | None, symmetric: bool) -> None:
    """The same as a layer whose columns are stored in that order; zeros stay where they were."""
    weight, hessian = uneven_problem()
    weight = pruned(weight, 0.2)
    (ordered,) = gptq_siblings([weight], hessian, 3, group_size, symmetric=symmetric, steps=Steps(order="groups"))
    columns, groups = group_order(hessian.diagonal(), group_size)
    (moved,) = gptq_siblings([weight[:, columns]], hessian[columns][:, columns], 3, group_size, symmetric=symmetric)
    assert torch.equal(ordered.codes[:, columns], moved.codes)
    assert torch.equal(ordered.scale[:, groups], moved.scale)
    torch.testing.assert_close(values(ordered.rounded)[:, columns], values(moved.rounded))
    assert not values(ordered.rounded)[weight == 0].any()
    assert ordered.relative_error == pytest.approx(moved.relative_error, rel=1e-4)
    (plain,) = gptq_siblings([weight], hessian, 3, group_size, symmetric=symmetric)
    assert ordered.relative_error < plain.relative_error


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
def test_columns_by_importance_are_the_textbooks_with_the_scales_of_their_groups(
    group_size: int | None, symmetric: bool
) -> None:
    """GPTQ's act-order with static groups: nothing but codes, scales and zero points has to be stored."""
    weight, hessian, size = *uneven_problem(), group_size or 192
    (ordered,) = gptq_siblings([weight], hessian, 3, group_size, symmetric=symmetric, steps=Steps(order="columns"))
    columns, _ = column_order(hessian.diagonal(), group_size)
    importance = torch.empty(192).index_put_((columns,), factor_hessian(hessian[columns][:, columns], 0.01).strength)
    for group in range(192 // size):
        block = slice(group * size, (group + 1) * size)
        search = search_scale if symmetric else search_affine
        found = search(weight.T[block].contiguous(), importance[block], 3, torch.float32)
        scale = found if symmetric else found[0]
        torch.testing.assert_close(ordered.scale[:, group], scale)
    if symmetric:
        of_column = ordered.scale.repeat_interleave(size, 1)[:, columns]
        expected = textbook_gptq(weight[:, columns], hessian[columns][:, columns], 3, of_column, 1, damping=0.01)
        kept = (weight != 0)[:, columns].all(1)
        assert int(kept.sum()) > 10
        same = (ordered.codes[:, columns] == expected)[kept].all(1)
        # A row's largest weight may lie just between two codes, where float32 and float64 part ways.
        assert float(same.float().mean()) > 0.7, same
    assert not values(ordered.rounded)[weight == 0].any()
    (plain,) = gptq_siblings([weight], hessian, 3, group_size, symmetric=symmetric)
    assert ordered.relative_error < plain.relative_error


def test_scales_by_the_hessian_lose_least_and_by_absmax_most() -> None:
    weight, hessian = uneven_problem()
    errors = {}
    for scale in ("absmax", "mse", "hessian"):
        (result,) = gptq_siblings([weight], hessian, 3, 32, steps=Steps(scale=scale))
        errors[scale] = result.relative_error
        first = absmax_scale(weight[:, :32], 3, torch.float32).squeeze(1)
        assert torch.equal(result.scale[:, 0], first) == (scale == "absmax")
    assert errors["hessian"] < errors["mse"] < errors["absmax"]


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_what_is_pruned_in_the_same_pass_stays_pruned(pattern: str | None) -> None:
    weight, hessian = problem()
    prune = SparseGPT(0.5, pattern)
    (plain,) = gptq_siblings([weight], hessian, 3, 32, prune=prune)
    (swept,) = gptq_siblings([weight], hessian, 3, 32, prune=prune, steps=Steps(sweeps=2))
    assert swept.relative_error < plain.relative_error
    assert float((swept.codes == 0).float().mean()) >= 0.5
    if pattern:
        assert bool(((swept.codes.view(24, -1, 4) == 0).sum(-1) >= 2).all())


@pytest.mark.parametrize("options", [{"sweeps": 2}, {"order": "groups"}, {"order": "columns"}, {"scale": "absmax"}])
def test_a_model_is_rounded_by_these_options(options: dict[str, Any]) -> None:
    """GPT-2's Conv1D has neither order nor sweeps, as a warning says, but a scale."""
    rows: dict[tuple[str, bool], list[float]] = {}
    for family in ("llama", "gpt2"):
        for chosen in (False, True):
            model = FAMILIES[family].model()
            method = GPTQ(bits=3, group_size=8, **(options if chosen else {}))
            ignored = family == "gpt2" and chosen and "scale" not in options
            told = pytest.warns(
                UserWarning, match=r"do not concern Conv1D: 16 layers, such as transformer\.h\.0\.attn"
            )
            with told if ignored else nullcontext():
                report = quantize(model, method, [inputs_of(FAMILIES[family])] * 4)
            rows[family, chosen] = [row.relative_error for row in report.rows]
            assert len(packed_layers(model)) == len(report.rows)
    assert rows["llama", False] != rows["llama", True]
    assert (rows["gpt2", False] != rows["gpt2", True]) == ("scale" in options)
    if "sweeps" in options:
        assert all(
            after < before for before, after in zip(*(rows["llama", one][:3] for one in (False, True)), strict=True)
        )
