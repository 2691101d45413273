"""Gram matrices by products of 8-bit integers.  They are used where the CPU has them; here they are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfcompress.calibration import integers
from hfcompress.calibration.hessian import (
    accumulate_products_,
    accumulate_triangle_,
    mirror_triangle_,
    relative_error,
)
from hfcompress.quantization.gptq import gptq


@pytest.fixture(autouse=True)
def fast_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integers, "integers_are_fast", lambda: True)


def gram(*batches: Tensor) -> Tensor:
    total = torch.zeros(batches[0].shape[1], batches[0].shape[1])
    for batch in batches:
        accumulate_triangle_(total, batch)
    return mirror_triangle_(total)


def correlated(tokens: int = 5000, columns: int = 300) -> Tensor:
    """Return inputs (tokens, columns) with a few directions much stronger than the others, as activations have."""
    torch.manual_seed(0)
    mixing = torch.randn(columns, columns) * torch.logspace(0, -2, columns).unsqueeze(1)
    return (torch.randn(tokens, columns) @ mixing).bfloat16()


def unlike(found: Tensor, inputs: Tensor) -> Tensor:
    """Return how far each element is from the true Gram matrix, over the sizes of its two columns."""
    true = inputs.double().T @ inputs.double()
    sizes = true.diagonal().clamp_min(1e-30).sqrt()
    return (found.double() - true) / sizes / sizes.unsqueeze(1)


def test_rounding_is_noise_within_what_is_promised() -> None:
    inputs = correlated()
    found = gram(inputs[:3000], inputs[3000:])
    error = unlike(found, inputs)
    assert error.any(), "nothing was rounded"
    assert torch.equal(found, found.T)
    assert float(error.diagonal().abs().max()) < 2 * integers.LARGEST_NOISE
    assert float(error.abs().max()) < 4 * integers.LARGEST_NOISE
    assert float(error.square().mean().sqrt()) < 0.2 * integers.LARGEST_NOISE


def test_the_result_is_a_gram_matrix() -> None:
    """Fewer tokens than columns: most eigenvalues of the true one are 0, and none here is below."""
    inputs = correlated(tokens=260)
    inputs[7, ::9] = 500.0
    eigenvalues = torch.linalg.eigvalsh(gram(inputs).double())
    assert float(eigenvalues[0]) > -1e-6 * float(eigenvalues[-1])
    assert int((eigenvalues > 1e-5 * eigenvalues[-1]).sum()) <= 260


def test_columns_with_outliers_are_rounded_in_finer_steps() -> None:
    inputs = correlated(tokens=integers.TOKENS)
    inputs[11, 5], inputs[3500, 290] = 3000.0, -800.0
    error = unlike(gram(inputs), inputs)
    assert float(error[[5, 290], [5, 290]].abs().max()) < 1e-5
    assert float(error[5, 290].abs()) < 1e-4
    others = [column for column in range(300) if column not in (5, 290)]
    assert float(error[others][:, others].abs().max()) < 4 * integers.LARGEST_NOISE
    assert float(error[5].abs().max()) < 4 * integers.LARGEST_NOISE


def test_many_columns_may_have_outliers() -> None:
    inputs = correlated(tokens=2 * integers.TOKENS)
    inputs[: integers.TOKENS, ::2].mul_(1e-3)
    inputs[3, ::2] = 100.0
    found = gram(inputs)
    assert float(unlike(found, inputs).abs().max()) < 4 * integers.LARGEST_NOISE
    eigenvalues = torch.linalg.eigvalsh(found.double())
    assert float(eigenvalues[0]) > -1e-6 * float(eigenvalues[-1])


@pytest.mark.parametrize("columns", [257, 513])
def test_strips_may_be_one_column_wide(columns: int) -> None:
    inputs = correlated(columns=columns)
    assert float(unlike(gram(inputs), inputs).abs().max()) < 4 * integers.LARGEST_NOISE


def test_products_of_differences_and_inputs_are_as_near() -> None:
    inputs = correlated()
    differences = inputs[:, :70].float() @ torch.randn(70, 90) * 1e-3 + torch.randn(len(inputs), 90)
    inputs[3, 8], differences[4, 80] = 900.0, 2000.0
    found = torch.zeros(90, 300)
    before = differences.clone()
    accumulate_products_(torch.zeros(300, 300), inputs, [(found, differences)])
    assert torch.equal(differences, before)
    true = differences.double().T @ inputs.double()
    sizes = [one.double().square().sum(0).sqrt() for one in (differences, inputs)]
    error = (found.double() - true) / sizes[0].unsqueeze(1) / sizes[1]
    assert error.any(), "nothing was rounded"
    assert float(error[80, 8].abs()) < 1e-4  # of 904 tokens that have no outlier a part is rounded
    assert float(error.abs().max()) < 4 * integers.LARGEST_NOISE
    assert float(error.square().mean().sqrt()) < 0.5 * integers.LARGEST_NOISE


def test_columns_of_zeros_stay_zero() -> None:
    inputs = correlated()
    inputs[:, 17] = 0
    found = gram(inputs)
    assert not found[17].any()
    assert not found[:, 17].any()
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_seen(value: float) -> None:
    inputs = correlated()
    inputs[9, 9] = value
    assert not bool(gram(inputs).isfinite().all())


def test_gptq_comes_as_near_with_it_as_with_the_true_one(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = correlated()
    weight = torch.randn(64, 300) / 300**0.5
    rounded = gram(inputs)
    monkeypatch.setattr(integers, "integers_are_fast", lambda: False)
    true = gram(inputs)
    assert not torch.equal(true, rounded)
    errors = []
    for hessian in (true, rounded):
        result = gptq(weight, hessian, bits=4, group_size=60)
        values = (result.codes.float().view(64, 5, 60) * result.scale.unsqueeze(-1)).view(64, 300)
        errors.append(relative_error(weight, values, true))
    assert errors[1] < 1.01 * errors[0]


@pytest.mark.parametrize(
    "inputs",
    [
        torch.randn(600, 300),
        torch.randn(600, 300).half(),
        torch.randn(600, 64).bfloat16(),
        torch.randn(9, 300).bfloat16(),
    ],
    ids=["float32", "float16", "few columns", "few tokens"],
)
def test_other_inputs_are_multiplied_in_float32(inputs: Tensor) -> None:
    assert not integers.integers_pay(inputs)
    assert float(unlike(gram(inputs), inputs).abs().max()) < 1e-5


def test_matrix_tiles_are_faster_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(integers, "vector_integers", lambda: True)
    monkeypatch.setattr(integers, "matrix_tiles", lambda: True)
    assert not integers.integers_are_fast()
    monkeypatch.setattr(integers, "matrix_tiles", lambda: False)
    assert integers.integers_are_fast()
    assert integers.integers_pay(correlated())


def test_inputs_are_rounded_once_for_all_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, differences = correlated(), [torch.randn(5000, size) for size in (40, 50)]
    alone = []
    for one in differences:
        hessian, cross = torch.zeros(300, 300), torch.zeros(one.shape[1], 300)
        accumulate_products_(hessian, inputs, [(cross, one)])
        alone.append(cross)
    widths: list[int] = []
    real = integers.RoundedRows.of
    monkeypatch.setattr(integers.RoundedRows, "of", lambda rows: widths.append(rows.shape[1]) or real(rows))
    together, hessian = [torch.zeros_like(one) for one in alone], torch.zeros(300, 300)
    accumulate_products_(hessian, inputs, list(zip(together, differences)))
    assert widths == [300, 40, 50] * 2  # of 5000 rows
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    assert torch.equal(mirror_triangle_(hessian), gram(inputs))
