"""One-shot pruning of one weight: the textbook's choice and values, exact counts, and safe on odd Hessians."""

from __future__ import annotations

import pydantic
import pytest
import torch
from torch import Tensor

from hfcompress.calibration import factor_hessian
from hfcompress.errors import ModelError
from hfcompress.pruning.oneshot import Magnitude, SparseGPT, Wanda, magnitude_pruned, sparsegpt, wanda_pruned
from hfcompress.quantization import gptq
from hfcompress.quantization.gptq import gptq_siblings
from tests.test_gptq import hessian_error, problem, values

PATTERNS = [
    (0.5, None),
    (0.29, None),
    (0.8, None),
    (0.5, "2:4"),
    (0.5, "4:8"),
    (0.75, "1:4"),
    (0.25, "24:32"),
    (0.5, "3:6"),
]
METHODS = (Magnitude, Wanda, SparseGPT)


def uneven_problem(rows: int = 24, columns: int = 192, seed: int = 0, tokens: int = 600) -> tuple[Tensor, Tensor]:
    """Return a weight and the Gram matrix of correlated inputs, some of which are far larger than others."""
    weight, hessian = problem(rows, columns, seed, tokens)
    sizes = torch.exp(torch.randn(columns, generator=torch.Generator().manual_seed(seed + 100)))
    return weight, hessian * sizes * sizes[:, None]


def pruned_weight(method: Magnitude | Wanda | SparseGPT, weight: Tensor, hessian: Tensor) -> Tensor:
    if isinstance(method, Magnitude):
        return weight.masked_fill(magnitude_pruned(weight, method), 0)
    if isinstance(method, Wanda):
        return weight.masked_fill(wanda_pruned(weight, hessian.diagonal(), method), 0)
    return sparsegpt([weight], hessian, method)[0].weight


def textbook_sparsegpt(
    weight: Tensor, hessian: Tensor, sparsity: float, pattern: str | None, damping: float
) -> Tensor:
    """Frantar and Alistarh's algorithm 1 in float64, one column at a time, with the inverse's Cholesky factor."""
    rest, damped = weight.double().clone(), hessian.double().clone()
    rows, columns = rest.shape
    damped.diagonal().add_(damping * damped.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    kept, group = (0, 128) if pattern is None else map(int, pattern.split(":"))
    goes = torch.zeros(rows, columns, dtype=torch.bool)
    for column in range(columns):
        if column % group == 0:
            stop = min(column + group, columns)
            cost = (rest[:, column:stop] / inverse.diagonal()[column:stop]) ** 2
            if pattern is None:
                count = int(sparsity * rows * stop + 1e-9) - int(goes.sum())
                order = cost.flatten().argsort()[:count]
                goes[:, column:stop] = (
                    torch.zeros(cost.numel(), dtype=torch.bool).scatter(0, order, True).view_as(cost)
                )
            else:
                goes[:, column:stop].scatter_(1, cost.argsort(dim=1)[:, : group - kept], True)
        new = rest[:, column].masked_fill(goes[:, column], 0)
        error = (rest[:, column] - new) / inverse[column, column]
        rest[:, column:] -= error[:, None] * inverse[column, column:]
        rest[:, column] = new
    return rest


@pytest.mark.parametrize(("sparsity", "pattern"), PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpts_blocked_loop_equals_the_textbook_column_by_column(
    sparsity: float, pattern: str | None, seed: int
) -> None:
    weight, hessian = uneven_problem(seed=seed)
    expected = textbook_sparsegpt(weight, hessian, sparsity, pattern, 0.01)
    result = sparsegpt([weight], hessian, SparseGPT(sparsity, pattern))[0]
    assert torch.equal(result.weight == 0, expected == 0)
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-3, atol=1e-5)
    own = (hessian_error(weight, expected, hessian) / hessian_error(weight, torch.zeros_like(weight), hessian)) ** 0.5
    assert result.relative_error == pytest.approx(own, rel=1e-3)
    assert result.damping_used == 0.01


@pytest.mark.parametrize(("sparsity", "pattern"), PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_wanda_takes_the_smallest_products_of_each_row(sparsity: float, pattern: str | None, seed: int) -> None:
    weight, hessian = uneven_problem(rows=6, seed=seed)
    goes = wanda_pruned(weight, hessian.diagonal(), Wanda(sparsity, pattern))
    norms = hessian.double().diagonal().sqrt()
    kept, group = (None, 192) if pattern is None else map(int, pattern.split(":"))
    for row, gone in zip(weight.double(), goes):
        for start in range(0, 192, group):
            score = (row.abs() * norms)[start : start + group]
            count = int(sparsity * 192 + 1e-9) if kept is None else group - kept
            assert set(gone[start : start + group].nonzero().flatten().tolist()) == set(
                score.argsort()[:count].tolist()
            )


@pytest.mark.parametrize(("sparsity", "pattern"), PATTERNS)
@pytest.mark.parametrize("seed", range(5))
def test_knowing_more_of_the_inputs_loses_less(sparsity: float, pattern: str | None, seed: int) -> None:
    weight, hessian = uneven_problem(seed=seed)
    by_size, by_product, by_hessian = (
        hessian_error(weight, pruned_weight(kind(sparsity, pattern), weight, hessian), hessian) for kind in METHODS
    )
    assert by_hessian < by_product < by_size


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.77, 0.99])
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("existing", [0.0, 0.3, 0.6])
def test_counts_are_exact_and_zeros_that_were_there_count(sparsity: float, kind: type, existing: float) -> None:
    """Old zeros lie in the first half of the columns and the first rows, so no block or row has its even share."""
    weight, hessian = uneven_problem(rows=20, columns=200)
    generator = torch.Generator().manual_seed(3)
    weight[:, :100].masked_fill_(torch.rand(20, 100, generator=generator) < existing, 0)
    weight[:4].masked_fill_(torch.rand(4, 200, generator=generator) < existing, 0)
    before = weight == 0
    after = pruned_weight(kind(sparsity), weight, hessian) == 0
    assert torch.equal(before & after, before)
    if kind is Wanda:
        expected = before.sum(1).clamp_min(int(sparsity * 200 + 1e-9))
        assert torch.equal(after.sum(1), expected)
    else:
        assert int(after.sum()) == max(int(before.sum()), int(sparsity * 4000 + 1e-9))


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_equal_weights_are_no_reason_to_prune_more(kind: type, sparsity: float) -> None:
    after = pruned_weight(kind(sparsity), torch.full((10, 40), 0.5), torch.eye(40)) == 0
    assert int(after.sum()) == sparsity * 400


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "12:16"])
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("with_zeros", [False, True])
def test_groups_keep_exactly_as_many_as_the_pattern_says(kind: type, pattern: str, with_zeros: bool) -> None:
    kept, group = map(int, pattern.split(":"))
    weight, hessian = uneven_problem()
    if with_zeros:
        weight.masked_fill_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) < 0.4, 0)
    live_before = (weight != 0).view(len(weight), -1, group).sum(-1)
    after = pruned_weight(kind(1 - kept / group, pattern), weight, hessian)
    assert torch.equal((after != 0).view(len(weight), -1, group).sum(-1), live_before.clamp_max(kept))
    assert not after[weight == 0].any()


@pytest.mark.parametrize("kind", [Wanda, SparseGPT])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_weights_of_dead_columns_go_first_and_no_more_than_asked(kind: type, pattern: str | None) -> None:
    weight, hessian = uneven_problem()
    dead = torch.zeros(192, dtype=torch.bool)
    dead[[0, 1, 70, 131, 191]] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    weight[::2, 64:128] = 0
    after = pruned_weight(kind(0.5, pattern), weight, hessian)
    assert bool(torch.isfinite(after).all())
    if pattern is None:
        assert int((after == 0).sum()) == 24 * 96
    assert not after[:, dead].any()
    alive = hessian + torch.diag(dead * hessian.diagonal().mean())
    blind = pruned_weight(kind(0.5, pattern), weight, alive)
    assert blind[:, dead].any()
    assert hessian_error(weight, after, hessian) <= hessian_error(weight, blind, hessian)


def test_a_hessian_that_is_not_positive_definite_is_damped_more_and_says_so() -> None:
    weight, hessian = problem()
    mean = float(hessian.diagonal().mean())
    vectors = torch.linalg.qr(torch.randn(192, 192, generator=torch.Generator().manual_seed(0)))[0]
    spectrum = torch.full((192,), mean)
    spectrum[0] = -0.3 * mean
    broken = vectors @ torch.diag(spectrum) @ vectors.T
    result = sparsegpt([weight], (broken + broken.T) / 2, SparseGPT(damping=0.01))[0]
    assert result.damping_used == pytest.approx(1.0)
    assert bool(torch.isfinite(result.weight).all())
    assert int((result.weight == 0).sum()) == weight.numel() // 2


def test_hopeless_hessians_are_refused() -> None:
    weight, hessian = problem()
    with pytest.raises(ModelError, match="saw only zeros"):
        sparsegpt([weight], torch.zeros_like(hessian), SparseGPT())
    hessian[0, 0] = torch.nan
    with pytest.raises(ModelError, match="holds NaN"):
        sparsegpt([weight], hessian, SparseGPT())


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_siblings_in_one_call_equal_calls_of_their_own(pattern: str | None) -> None:
    """Scaled unlike, so that a choice over all of them together would prune the small one alone."""
    weight, hessian = uneven_problem(rows=30)
    parts = [part * scale for part, scale in zip(weight.split([16, 6, 8]), (1.0, 0.01, 3.0))]
    for part, result in zip(parts, sparsegpt(parts, hessian, SparseGPT(0.5, pattern)), strict=True):
        alone = sparsegpt([part], hessian, SparseGPT(0.5, pattern))[0]
        assert int((result.weight == 0).sum()) == part.numel() // 2
        assert float(((result.weight == 0) != (alone.weight == 0)).float().mean()) < 0.002
        assert result.relative_error == pytest.approx(alone.relative_error, rel=1e-2)


def test_weights_keep_their_dtype_and_are_not_changed() -> None:
    weight, hessian = problem()
    low = weight.bfloat16()
    before = low.clone()
    result = sparsegpt([low], hessian, SparseGPT())[0]
    assert result.weight.dtype == torch.bfloat16
    assert torch.equal(low, before)
    assert result.relative_error == pytest.approx(
        sparsegpt([weight], hessian, SparseGPT())[0].relative_error, rel=0.02
    )


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, 64), (4, None), (8, 32)])
@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, None), (0.7, None), (0.5, "2:4"), (0.5, "4:8")])
@pytest.mark.parametrize("seed", range(3))
def test_pruning_and_rounding_in_one_pass_is_no_worse_than_one_after_the_other(
    bits: int, group_size: int | None, sparsity: float, pattern: str | None, seed: int
) -> None:
    weight, hessian = uneven_problem(seed=seed)
    method = SparseGPT(sparsity, pattern)
    sparse = sparsegpt([weight], hessian, method)[0].weight
    after = gptq(sparse, hessian, bits, group_size)
    joint = gptq_siblings([weight], hessian, bits, group_size, 0.01, method)[0]
    first, second = (values(one.codes, one.scale, group_size) for one in (after, joint))
    assert hessian_error(weight, second, hessian) <= hessian_error(weight, first, hessian) * (1 + 1e-4)
    assert hessian_error(weight, second, hessian) == pytest.approx(
        joint.relative_error**2 * hessian_error(weight, torch.zeros_like(weight), hessian), rel=1e-3
    )
    zeros = joint.codes == 0
    if pattern is None:
        assert int(zeros.sum()) >= int(sparsity * weight.numel())
    else:
        kept, group = map(int, pattern.split(":"))
        assert int((~zeros).view(24, -1, group).sum(-1).max()) <= kept


def test_knowing_the_rounding_errors_helps_the_choice_on_average() -> None:
    """The pass that does both at once must be worth having beside the one that rounds what is pruned."""
    ratios = []
    for seed in range(6):
        weight, hessian = uneven_problem(seed=seed)
        sparse = sparsegpt([weight], hessian, SparseGPT(0.5))[0].weight
        before = gptq(sparse, hessian, 3, 32)
        joint = gptq_siblings([weight], hessian, 3, 32, 0.01, SparseGPT(0.5))[0]
        ratios.append(joint.relative_error / before_error(weight, before, hessian))
    assert sum(ratios) / len(ratios) < 0.995


def before_error(weight: Tensor, result: object, hessian: Tensor) -> float:
    size = hessian_error(weight, torch.zeros_like(weight), hessian)
    return (hessian_error(weight, values(result.codes, result.scale, 32), hessian) / size) ** 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"pattern": "2:4", "sparsity": 0.4}, r"keeps 2 of every 4 weights, which is sparsity=0\.5, not 0\.4"),
        ({"pattern": "1:4"}, r"sparsity=0\.75, not 0\.5"),
        ({"pattern": "4:4"}, "prunes nothing"),
        ({"pattern": "4x1"}, "is no N:M such as '2:4'"),
        ({"pattern": "half"}, "N:M such as '2:4'"),
        ({"sparsty": 0.5}, "sparsty"),
    ],
)
def test_wrong_options_are_refused(kind: type, options: dict[str, object], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        kind(**options)


def test_the_factor_names_dead_columns() -> None:
    _, hessian = problem()
    hessian[5] = 0
    hessian[:, 5] = 0
    assert factor_hessian(hessian, 0.01).dead.nonzero().flatten().tolist() == [5]
