"""What calibration cannot give is said with names and numbers, in a warning and in the report, or is refused."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from hfcompress.errors import ModelError
from hfcompress.packed import packed_layers
from hfcompress.quantization import AWQ, GPTQ, SmoothQuant, quantize
from tests.conftest import tiny_llama, token_batches

Method = GPTQ | AWQ | SmoothQuant
CALIBRATED: dict[str, Method] = {
    "gptq": GPTQ(group_size=32),
    "best": GPTQ(group_size=32, quality="best"),
    "awq": AWQ(group_size=32),
    "smoothquant": SmoothQuant(),
}


@pytest.mark.usefixtures("few_tokens_are_fine")
def test_a_hessian_that_is_not_positive_definite_is_damped_more_and_named() -> None:
    """Ten tokens leave the Hessian of 64 columns singular, and the damping asked for is too small to help."""
    few = token_batches(count=1, rows=1, length=10)
    with pytest.warns(UserWarning, match="could not be factored with damping 1e-12") as told:
        report = quantize(tiny_llama(), GPTQ(group_size=32, damping=1e-12), few)
    damped = [str(one.message) for one in told if "could not be factored with damping 1e-12" in str(one.message)]
    assert damped[0].startswith("The Hessian of model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj")
    raised = {row.name: row.damping for row in report.rows if row.damping is not None and row.damping > 1e-12}
    said = [float(number) for text in damped for number in re.findall(r"damped by (\S+) of", text)]
    assert set(raised) == {name for text in damped for name in re.findall(r"model\.layers\.\S+proj", text)}
    assert sorted(set(said)) == pytest.approx(sorted(set(raised.values())), rel=1e-4)
    assert all(0 <= row.relative_error < 1 for row in report.rows)


def test_columns_that_see_only_zeros_are_rounded_and_disturb_nothing() -> None:
    batches = token_batches(8)
    dead = torch.tensor([0, 3, 4, 40, 63])
    method = GPTQ(group_size=None, bits=8)
    plain, silenced, model = tiny_llama(1), tiny_llama(1), tiny_llama(1)
    for one in (silenced, model):
        one.model.layers[0].input_layernorm.weight.data[dead] = 0
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    silenced.model.layers[0].self_attn.q_proj.weight.data[:, dead] = 0
    reports = [quantize(one, method, batches) for one in (plain, silenced, model)]
    packed = model.model.layers[0].self_attn.q_proj
    rounding = (packed.dequantize() - weight)[:, dead].abs()
    assert bool((rounding <= 0.501 * packed.weight_scale).all())
    errors = [report.rows[0].relative_error for report in reports]
    assert errors[2] == pytest.approx(errors[1], rel=0.2)
    assert errors[2] < 2 * errors[0]


def test_group_sizes_that_do_not_divide_fall_back_by_name_and_in_the_report() -> None:
    model = tiny_llama(1, intermediate_size=96)
    expected = r"Group sizes .* were changed: 128 -> 64 for 64 columns \(6 layers, such as .*q_proj\); 128 -> 32"
    with pytest.warns(UserWarning, match=expected):
        report = quantize(model, GPTQ(), token_batches(8))
    sizes = {row.name.rpartition(".")[2]: (row.group_size, row.requested_group_size) for row in report.rows}
    assert sizes["down_proj"] == (32, 128)
    assert {size for name, size in sizes.items() if name != "down_proj"} == {(64, 128)}
    assert {name: one.group_size for name, one in packed_layers(model).items()} == {
        row.name: row.group_size for row in report.rows
    }


@pytest.mark.parametrize("method", CALIBRATED.values(), ids=CALIBRATED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_no_numbers_are_refused_with_the_layer_s_name(value: float, method: Method) -> None:
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: (args[0].index_fill(-1, torch.tensor([5]), value),), prepend=True
    )
    with pytest.raises(ModelError, match=r"model\.layers\.1: the inputs of mlp\.down_proj hold NaN or infinite"):
        quantize(model, method, token_batches(8))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("method", CALIBRATED.values(), ids=CALIBRATED)
def test_linears_that_see_no_token_are_named(method: Method) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.expert = nn.Linear(64, 64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"No calibration token reaches model\.layers\.1\.mlp\.expert\."):
        quantize(model, method, token_batches(8))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    report = quantize(model, replace(method, exclude=("*.expert",)), token_batches(8))
    assert len(report.rows) == 14


def test_enough_tokens_that_all_reach_every_layer_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = quantize(tiny_llama(), GPTQ(group_size=32), token_batches(8))
    assert {row.tokens for row in report.rows} == {8 * 4 * 16}
