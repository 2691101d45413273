"""AWQ: scales that move into what is before a linear layer, searched by the error of its outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hfcompress
from hfcompress.calibration import walk_layers
from hfcompress.packed import packed_layers, values_of
from hfcompress.quantization import AWQ, RTN, quantize
from hfcompress.quantization.awq import Reader, search_scale_of_inputs
from hfcompress.quantization.folding import Changes, NormFold, fold_, folds_of, undo_
from hfcompress.quantization.linear_folds import LinearFold, LinearFolds
from hfcompress.quantization.rtn import round_to_nearest
from hfcompress.structure.stack import linear_weights_of
from tests.conftest import tiny_llama, token_batches
from tests.families import FAMILIES, inputs_of
from tests.test_w8a8 import outputs, with_outliers
from tests.uneven import cut_llama, llama, output_of

pytestmark = pytest.mark.usefixtures("few_tokens_are_fine")
BATCHES = [{"input_ids": batch["input_ids"]} for batch in token_batches(4)]


def error_of(columns: Tensor, scale: Tensor, weight: Tensor, inputs: Tensor, bits: int, group: int) -> float:
    """The paper's equation 4 for one exponent, in float64, row by row and group by group."""
    by_column = scale[columns]
    total = torch.zeros(len(inputs), len(weight), dtype=torch.float64)
    for row in range(len(weight)):
        for first in range(0, weight.shape[1], group):
            part = slice(first, first + group)
            values = (weight[row, part] * by_column[part]).float()
            step = (values[values.abs().argmax()] / -(2 ** (bits - 1))).double()
            codes = (values / step.float()).double().round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            total[:, row] += (inputs[:, part] / by_column[part]) @ (codes * step)
    return float((total - inputs @ weight.T).square().sum())


@pytest.mark.parametrize("repeats", [1, 2], ids=["own rows", "rows that make two columns each"])
def test_the_scale_is_the_textbooks(repeats: int) -> None:
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 16, generator=random, dtype=torch.float64)
    inputs[:, [1, 6, 11]] *= torch.tensor([20.0, 9.0, 14.0], dtype=torch.float64)
    weights = [torch.randn(rows, 16, generator=random).double() for rows in (6, 3)]
    units = 16 // repeats
    columns = torch.arange(16) % units
    large, wide = (
        torch.stack([squares[columns == unit].mean() for unit in range(units)]).sqrt()
        for squares in (inputs.square().sum(0), torch.stack([one.square().mean(0) for one in weights]).mean(0))
    )
    candidates = [torch.ones(units, dtype=torch.float64)]
    for exponent in (index / 10 for index in range(1, 10)):
        candidates += [large**exponent, large**exponent / wide ** (1 - exponent)]
    candidates = [one / one.log().mean().exp() for one in candidates]
    errors = [sum(error_of(columns, one, weight, inputs, 4, 8) for weight in weights) for one in candidates]
    expected = candidates[errors.index(min(errors))]
    readers = [Reader(weight.float(), 4, 8, True, torch.float32) for weight in weights]
    hessian = (inputs.T @ inputs).float()
    found = search_scale_of_inputs(readers, hessian, columns if repeats > 1 else None, units, 10)
    assert min(errors) < 0.8 * errors[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    again = sum(one.error(one.rounded(found[columns]), hessian, found[columns]) for one in readers)
    assert again == pytest.approx(min(errors), rel=1e-3)


def test_ranges_are_searched_by_the_inputs_squares() -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(32, generator=torch.Generator().manual_seed(1)) ** 6
    for symmetric in (True, False):
        plain, weighed = (
            values_of(*round_to_nearest(weight, 3, 16, symmetric, importance=one)) for one in (None, importance)
        )
        loss = [((one - weight).square() * importance).view(5, 2, 16).sum(-1) for one in (plain, weighed)]
        assert bool((loss[1] <= loss[0] * 1.0001).all())
        assert float(loss[1].sum()) < 0.8 * float(loss[0].sum())
        alike = round_to_nearest(weight, 3, 16, symmetric, importance=torch.ones(32))
        assert all(
            one is other is None or torch.equal(one, other)
            for one, other in zip(alike, round_to_nearest(weight, 3, 16, symmetric, "mse"))
        )


EXPECTED = {
    # norms, and linear layers before others, of each stack's second layer
    "llama": [({"k_proj q_proj v_proj", "gate_proj up_proj"}, {"v_proj o_proj", "up_proj down_proj"})],
    "gemma3": [({"k_proj q_proj v_proj", "gate_proj up_proj"}, {"v_proj o_proj", "up_proj down_proj"})],
    "phi3": [({"qkv_proj", "gate_up_proj"}, set())],
    "gpt2": [(set(), set())],
    "vit": [({"k_proj q_proj v_proj", "fc1"}, {"v_proj o_proj"})],
    "bert": [(set(), {"value dense"})],
    "whisper": [
        ({"k_proj q_proj v_proj", "fc1"}, {"v_proj out_proj"}),
        ({"k_proj q_proj v_proj", "q_proj", "fc1"}, {"v_proj out_proj"}),
    ],
    "t5": [({"k q v", "wi"}, {"v o", "wi wo"}), ({"k q v", "q", "wi"}, {"v o", "wi wo"})],
}


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", EXPECTED)
def test_folds_are_found_and_change_nothing(family: str, dtype: torch.dtype) -> None:
    """Also of norms with a weight of one more (Gemma), norms and values with biases, and grouped heads."""
    model, inputs = FAMILIES[family].model().to(dtype), inputs_of(FAMILIES[family])
    inputs = {name: one.to(dtype) if one.is_floating_point() else one for name, one in inputs.items()}
    found = []
    changes: Changes = {}
    random = torch.Generator().manual_seed(0)
    for visit in walk_layers(model, [inputs]):
        if visit.index != 1:
            continue
        with torch.no_grad():
            before = visit.output(0)
        folds = folds_of(visit, set(linear_weights_of(visit.layer)), LinearFolds())
        norms = {" ".join(sorted(map(leaf, one.readers))) for one in folds if isinstance(one, NormFold)}
        found.append((norms, {f"{leaf(f.name)} {leaf(*f.readers)}" for f in folds if isinstance(f, LinearFold)}))
        for fold in folds:
            fold_(fold, torch.rand(fold.units, generator=random) * 4 + 0.1, changes)
        with torch.no_grad():
            difference = float((visit.output(0) - before).norm() / before.norm())
        assert difference <= (1e-5 if dtype == torch.float32 else 4e-2)
    assert found == EXPECTED[family]
    assert len({one.data_ptr() for one in changes}) == len(changes)
    undo_(changes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_closer_than_rounding_where_inputs_have_outliers(symmetric: bool) -> None:
    expected = outputs(with_outliers(tiny_llama()), BATCHES[0])
    errors = []
    for method in (RTN(bits=3, group_size=16, symmetric=symmetric), AWQ(bits=3, group_size=16, symmetric=symmetric)):
        model = with_outliers(tiny_llama())
        report = quantize(model, method, BATCHES)
        errors.append(float((outputs(model, BATCHES[0]) - expected).norm()))
    assert errors[1] < 0.85 * errors[0]
    assert all(row.scaled for row in report.rows)


def test_a_layers_error_is_never_above_that_of_rounding() -> None:
    """Of an only layer, which both methods see alike."""
    rows = []
    for method in (RTN(bits=3, group_size=16), AWQ(bits=3, group_size=16, clip=False)):
        model = with_outliers(tiny_llama(layers=1))
        visit = next(iter(walk_layers(model, BATCHES)))
        hessians = {name: one.hessian for one in visit.input_hessians() for name in one.names}
        dense = {name: one.weight.detach().clone() for name, one in linear_weights_of(visit.layer).items()}
        report = quantize(model, method, BATCHES)
        rows.append({row.name.removeprefix("model.layers.0."): row.relative_error for row in report.rows})
        if isinstance(method, RTN):
            packed = {name.removeprefix("model.layers.0."): one for name, one in packed_layers(model).items()}
            for name, weight in dense.items():
                difference = weight - packed[name].dequantize()
                lost, all_of_it = (float(((one @ hessians[name]) * one).sum()) for one in (difference, weight))
                rows[0][name] = (lost / all_of_it) ** 0.5
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # which share their scale with no other
        assert rows[1][name] < rows[0][name]


def test_dead_columns_change_no_scale() -> None:
    model = with_outliers(tiny_llama())
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[5:9] = 0
        layer.self_attn.v_proj.weight.data[3] = 0
        layer.mlp.up_proj.weight.data[:7] = 0
    expected = outputs(model, BATCHES[0])
    quantize(model, AWQ(bits=8, group_size=16), BATCHES)
    assert all(bool(torch.isfinite(one).all()) for one in model.state_dict().values())
    assert not model.model.layers[0].input_layernorm.weight[5:9].any()
    found = outputs(model, BATCHES[0])
    assert float((found - expected).norm()) < 0.05 * float(expected.norm())


def test_what_nothing_takes_the_scales_of_is_named() -> None:
    model = FAMILIES["gpt_neox"].model()
    report = quantize(model, AWQ(bits=4, group_size=16), [inputs_of(FAMILIES["gpt_neox"])])
    unscaled = {leaf(row["name"]) for row in report.to_dict()["rows"] if row["scaled"] is False}
    assert unscaled == {"dense", "dense_4h_to_h"}  # values come fused with queries; GELU passes no factor on
    gpt2, expected = FAMILIES["gpt2"].model(), FAMILIES["gpt2"].model()
    with pytest.warns(UserWarning, match=r"nothing was scaled: this is RTN"):
        quantize(gpt2, AWQ(bits=4, group_size=16), [inputs_of(FAMILIES["gpt2"])])
    quantize(expected, RTN(bits=4, group_size=16))
    assert all(torch.equal(one, expected.state_dict()[name]) for name, one in gpt2.state_dict().items())


def test_excluded_layers_keep_their_weights() -> None:
    model = with_outliers(tiny_llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = quantize(model, AWQ(bits=4, group_size=16, exclude=("*.v_proj", "*.gate_proj")), BATCHES)
    after = model.state_dict()
    kept = [name for name in before if "norm" in name or "v_proj" in name or "gate_proj" in name]
    assert all(torch.equal(after[name], before[name]) for name in kept)
    scaled = {leaf(row.name) for row in report.rows if row.scaled}
    assert scaled == {"down_proj"}  # whose scales went into up_proj
    assert type(model.model.layers[0].self_attn.v_proj) is nn.Linear


def test_an_uneven_model_reloads(tmp_path: Path) -> None:
    model = cut_llama(llama())
    quantize(model, AWQ(bits=4, group_size=8), BATCHES)
    expected = output_of(model)
    hfcompress.save_compressed(model, tmp_path / "out")
    assert torch.equal(output_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)
