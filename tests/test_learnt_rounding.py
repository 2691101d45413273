"""Gradient steps learn a layer's codes from what it gives, and keep them only where rows they did not see gain."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hfcompress
from hfcompress.errors import ModelError
from hfcompress.packed import PackedWeight, packed_layers
from hfcompress.packed.weight import values_of
from hfcompress.quantization import GPTQ, calibrated, quantize
from hfcompress.quantization.grids import Rounded
from hfcompress.quantization.placing import pack_
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.tuning import learning
from hfcompress.quantization.tuning.codes import LearntCodes, _Rounded
from hfcompress.quantization.tuning.scales import distances
from hfcompress.structure import stack_linears
from tests.conftest import tiny_llama
from tests.families import FAMILIES
from tests.test_scale_tuning import data, many_inputs

pytestmark = pytest.mark.usefixtures("few_tokens_are_fine")

GIVEN = GPTQ(bits=2, group_size=16, quality="best", tuning_steps=0)
LEARNT = replace(GIVEN, rounding_steps=60)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "STEP_TOKENS", 384)


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: distances(layer) for name, layer in packed_layers(model).items()}


def first_layer_error(model: PreTrainedModel, dense: PreTrainedModel, batches: list[dict[str, Tensor]]) -> float:
    """Return the error of the first layer's output as a share of it, of the average token by plain forward passes."""
    shares = []
    with torch.no_grad():
        for batch in batches:
            own, wanted = (
                one.model(**batch, output_hidden_states=True).hidden_states[1].double() for one in (model, dense)
            )
            shares.append((own - wanted).square().sum(-1) / wanted.square().sum(-1))
    return float(torch.cat(shares).mean().sqrt())


@pytest.fixture
def _spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have GPTQ choose one code in 8 wrongly."""
    generator = torch.Generator().manual_seed(0)

    def spoilt_(model: nn.Module, one: PlannedLinear, rounded: Rounded) -> PackedWeight:
        wrong = torch.rand(rounded.codes.shape, generator=generator) < 0.125
        codes = torch.where(wrong, (rounded.codes + 1).clamp_max(2 ** (one.bits - 1) - 1), rounded.codes)
        return pack_(model, one, rounded._replace(codes=codes))

    monkeypatch.setattr(calibrated, "pack_", spoilt_)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_layer_comes_nearer_to_the_dense_one_on_text_it_never_saw(symmetric: bool) -> None:
    dense = tiny_llama()
    plain, learnt = copy.deepcopy(dense), copy.deepcopy(dense)
    quantize(plain, replace(GIVEN, symmetric=symmetric), data(dense, 64))
    report = quantize(learnt, replace(LEARNT, symmetric=symmetric), data(dense, 64))
    assert all(row.output_error_after <= row.output_error_before for row in report.rows)
    assert report.rows[0].output_error_after < 0.98 * report.rows[0].output_error_before
    unseen = data(dense, seed=1)
    assert first_layer_error(learnt, dense, unseen) < 0.98 * first_layer_error(plain, dense, unseen)


@pytest.mark.usefixtures("_spoilt")
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (2, False), (3, True), (4, False)])
def test_codes_that_are_wrong_are_put_right(bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_llama()
    given, learnt = (replace(one, bits=bits, symmetric=symmetric) for one in (GIVEN, LEARNT))
    wrong, right, mended = (copy.deepcopy(dense) for _ in range(3))
    quantize(wrong, given, data(dense, 64))
    report = quantize(mended, learnt, data(dense, 64))
    monkeypatch.setattr(calibrated, "pack_", pack_)
    quantize(right, given, data(dense, 64))
    assert report.rows[0].output_error_after < 0.95 * report.rows[0].output_error_before
    name = "model.layers.0.self_attn.q_proj"  # of the first turn, so that all three begin alike
    before, now, should = (codes_of(model)[name] for model in (wrong, mended, right))
    spoilt = before != should
    assert spoilt.any()
    assert (now == should)[spoilt].float().mean() > 0.3
    assert (now != should)[~spoilt].float().mean() < 0.15
    for layer in packed_layers(mended).values():
        assert (layer.codes() >= -(2 ** (bits - 1))).all()
        assert (layer.codes() < 2 ** (bits - 1)).all()


def test_what_is_reported_is_what_rows_that_no_step_saw_give() -> None:
    dense, batches = tiny_llama(), data(tiny_llama())
    plain, learnt = copy.deepcopy(dense), copy.deepcopy(dense)
    quantize(plain, GIVEN, batches)
    row = quantize(learnt, LEARNT, batches).rows[0]
    assert row.output_error_before == pytest.approx(first_layer_error(plain, dense, batches[15:]), rel=1e-4)
    assert row.output_error_after == pytest.approx(first_layer_error(learnt, dense, batches[15:]), rel=1e-4)


def rows_in(portions: Iterable[learning.Portion]) -> list[tuple[int, int]]:
    return [(one.batch, row) for one in portions for row in range(one.rows.start, one.rows.stop)]


def test_rows_of_the_check_are_in_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "STEP_TOKENS", 40)  # of rows of 12 tokens, four
    seen, judging = learning._portions([torch.zeros(40, 12, 8), torch.zeros(27, 12, 8)])
    assert sorted(rows_in([*seen, *judging])) == [(0, row) for row in range(40)] + [(1, row) for row in range(27)]
    assert rows_in(judging) == [(1, 20), (1, 21), (1, 22), (1, 23)]
    steps = list(learning._steps_of(seen, 15))
    assert [len(step) for step in steps[:13]].count(1) >= 12  # the portion of three rows is joined with another
    assert {row for step in steps for row in rows_in(step)} == {*rows_in(seen)}
    assert learning._portions([torch.zeros(4, 12, 8)])[1] == []


def test_a_step_takes_several_small_batches_and_no_row_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "STEP_TOKENS", 100)
    seen, judging = learning._portions([torch.zeros(1, 12, 8)] * 6)
    assert rows_in(judging) == [(5, 0)]
    assert [sorted(rows_in(step)) for step in learning._steps_of(seen, 3)] == [[(row, 0) for row in range(5)]] * 3
    monkeypatch.setattr(learning, "STEP_TOKENS", 20)
    assert [len(step) for step in learning._steps_of(seen, 5)] == [2] * 5
    assert len({row for step in list(learning._steps_of(seen, 5))[:2] for row in rows_in(step)}) == 4


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_passes_gradients_on_and_scales_get_theirs(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    positions = (3 * torch.randn(6, 32, generator=generator)).requires_grad_()
    scale = torch.randn(6, 4, generator=generator).requires_grad_()
    low = torch.full((6, 4), -2, dtype=torch.int8 if symmetric else torch.int16)
    low = low if symmetric else low + torch.randint(-1, 2, (6, 4), generator=generator).short()
    weights = torch.randn(6, 32, generator=generator)
    values = _Rounded.apply(positions, scale, low, low + 3)
    found = torch.autograd.grad((values * weights).sum(), (positions, scale))
    lowest, highest = (end.float().repeat_interleave(8, 1) for end in (low, low + 3))
    codes = torch.minimum(torch.maximum(positions.detach().round(), lowest), highest)
    torch.testing.assert_close(values, values_of(codes.clone(), scale.detach(), None))
    wide = scale.repeat_interleave(8, 1)
    passed = positions + (codes - positions).detach()
    expected = torch.autograd.grad((passed * wide * weights).sum(), (positions, scale))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


def test_nothing_is_learnt_before_the_first_step() -> None:
    model, dense = tiny_llama(), tiny_llama()
    quantize(model, GIVEN, data(model))
    layers = packed_layers(model)
    before = copy.deepcopy(model.state_dict())
    learnt = LearntCodes([(layer, dense.get_submodule(name).weight) for name, layer in layers.items()], False)
    learnt.take_(learnt.now())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_codes_stay_where_rows_that_no_step_saw_gain_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, learnt = tiny_llama(), tiny_llama()
    quantize(plain, GIVEN, data(plain))
    for name in ("POSITION_PATH", "SCALE_PATH"):
        monkeypatch.setattr(learning, name, 300.0)
    for row in quantize(learnt, LEARNT, data(plain)).rows:
        assert row.output_error_after == row.output_error_before > 0
    expected = plain.state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in learnt.state_dict().items())


def test_the_best_check_is_kept_and_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that grow instead of falling spoil what the first steps gain."""
    plain = tiny_llama()
    quantize(plain, GIVEN, data(plain))
    step = torch.optim.Adam.step
    count = 0

    def spoiling(self: Any) -> None:
        nonlocal count
        count += 1
        for group in self.param_groups:
            group["lr"] *= 1000.0 if count % 60 in range(16, 60) or count % 60 == 0 else 1.0
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", spoiling)
    report = quantize(tiny_llama(), LEARNT, data(plain))
    assert report.rows[0].output_error_after < report.rows[0].output_error_before


def test_pruned_weights_stay_zero() -> None:
    model = tiny_llama()
    hfcompress.prune(model, hfcompress.Magnitude(sparsity=0.5))
    zeros = {name: model.get_submodule(name).weight == 0 for name in stack_linears(model)}
    quantize(model, LEARNT, data(model))
    assert all(not layer.dequantize()[zeros[name]].any() for name, layer in packed_layers(model).items())


def test_a_pattern_pruned_in_the_same_pass_stays() -> None:
    model = tiny_llama()
    report = quantize(model, LEARNT, data(model), prune=hfcompress.SparseGPT(pattern="2:4"))
    assert any(row.output_error_after < row.output_error_before for row in report.rows)
    for layer in packed_layers(model).values():
        assert ((layer.dequantize() != 0).view(-1, 4).sum(1) <= 2).all()


def test_padding_counts_neither_in_steps_nor_in_the_check() -> None:
    states, reports = [], []
    for filling in (0, 9):
        model, batches = tiny_llama(), data(tiny_llama())
        for batch in batches:
            batch["attention_mask"][::2, 8:] = 0
            batch["input_ids"][::2, 8:] = filling
        reports.append([replace(row, seconds=0) for row in quantize(model, LEARNT, batches).rows])
        states.append(model.state_dict())
    assert reports[0] == reports[1]
    assert all(torch.equal(one, states[1][name]) for name, one in states[0].items())


def test_batches_of_another_size_make_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    whole = {name: torch.cat([one[name] for one in data(tiny_llama())]) for name in ("input_ids", "attention_mask")}
    monkeypatch.setattr(learning, "STEP_TOKENS", 48)
    for rows in (4, 8, 64):
        model = tiny_llama()
        batches = [{name: values[at : at + rows] for name, values in whole.items()} for at in range(0, 64, rows)]
        quantize(model, LEARNT, batches)
        found.append(codes_of(model))
    for other in found[1:]:
        assert all(torch.equal(one, other[name]) for name, one in found[0].items())


@pytest.mark.usefixtures("_spoilt")
@pytest.mark.parametrize("family", list(FAMILIES))
def test_layers_of_every_family_learn(family: str) -> None:
    spec = FAMILIES[family]
    model = spec.model()
    report = quantize(model, replace(LEARNT, rounding_steps=10), many_inputs(spec, 24))
    assert all(row.output_error_after <= row.output_error_before for row in report.rows)
    assert any(row.output_error_after < row.output_error_before for row in report.rows)


def test_nothing_else_is_touched() -> None:
    model = tiny_llama().train()
    model.model.norm.weight.requires_grad_(False)
    others = {name: one for name, one in model.named_parameters() if "layers" not in name or "norm" in name}
    kept = {name: (one.detach().clone(), one.requires_grad) for name, one in others.items()}
    quantize(model, LEARNT, data(model))
    now = dict(model.named_parameters())
    for name, (value, wanted) in kept.items():
        assert torch.equal(value, now[name])
        assert now[name].grad is None
        assert now[name].requires_grad == wanted
    assert all(module.training for module in model.modules())
    assert all("forward" not in vars(module) and "dequantize" not in vars(module) for module in model.modules())


def test_a_failure_brings_the_dense_model_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    step = torch.optim.Adam.step
    calls = 0

    def fail(self: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 70:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, LEARNT, data(model))
    assert not packed_layers(model)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(one.requires_grad for one in model.parameters())


def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, again = tiny_llama(), tiny_llama()
    expected = quantize(whole, LEARNT, data(whole))

    def stop(name: str, rows: Any) -> None:
        if name.endswith(".1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(again, LEARNT, data(whole), stop, shards=tmp_path)
    report = quantize(again, LEARNT, data(whole), shards=tmp_path)
    assert [replace(row, seconds=0) for row in report.rows] == [replace(row, seconds=0) for row in expected.rows]
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in whole.state_dict().items())


def test_gradients_are_taken_wherever_it_is_called() -> None:
    outside, inside = tiny_llama(), tiny_llama()
    quantize(outside, LEARNT, data(outside))
    with torch.no_grad():
        quantize(inside, LEARNT, data(inside))
    assert all(torch.equal(one, codes_of(inside)[name]) for name, one in codes_of(outside).items())
    with torch.inference_mode(), pytest.raises(ModelError, match=r"outside torch.inference_mode.* rounding_steps=0"):
        quantize(tiny_llama(), LEARNT, data(inside))


def test_fast_has_nothing_to_learn_from() -> None:
    with pytest.raises(ValueError, match=r"rounding_steps=8 goes with quality='best'"):
        GPTQ(rounding_steps=8)


def test_one_row_alone_learns_nothing_as_none_could_judge() -> None:
    model = tiny_llama()
    report = quantize(model, LEARNT, data(model, 1))
    assert {(row.output_error_before, row.output_error_after) for row in report.rows} == {(None, None)}


def test_the_checkpoint_holds_what_was_learnt(tmp_path: Path) -> None:
    model = tiny_llama()
    quantize(model, LEARNT, data(model))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = data(model, 1, seed=3)[0]
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedWeight)
