"""Gradient steps learn a layer's codes from what it gives, and keep them only where rows they did not see gain."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedModel

import hfcompress
from hfcompress.calibration.parts import row_parts
from hfcompress.calibration.running import watching
from hfcompress.calibration.walk import walk_layers
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
from tests.conftest import VOCABULARY_SIZE, tiny_llama
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


class Rows:
    """A visit of batches of so many rows of 12 tokens each, of which some are padding."""

    def __init__(self, sizes: Sequence[int], padded: Sequence[tuple[int, int]] = (), cut: bool = True) -> None:
        self.outputs = [torch.ones(size, 12, 8) for size in sizes]
        for index, row in padded:
            self.outputs[index][row] = 0
        self.cut = cut

    def parts(self, index: int, tokens: int) -> list[slice]:
        states = self.outputs[index]
        return row_parts(states, tokens) if self.cut else [slice(0, len(states))]

    def part_of(self, index: int, rows: slice, states: Tensor) -> Tensor:
        return states[rows][states[rows].any(-1)]

    def portions(self) -> tuple[list[learning.Portion], list[learning.Portion]]:
        return learning._portions(self, self.outputs)


def rows_in(portions: Iterable[learning.Portion]) -> list[tuple[int, int]]:
    return [(one.batch, row) for one in portions for row in range(one.rows.start, one.rows.stop)]


def test_rows_of_the_check_are_in_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "STEP_TOKENS", 48)
    seen, judging = Rows([40, 27]).portions()
    assert sorted(rows_in([*seen, *judging])) == [(0, row) for row in range(40)] + [(1, row) for row in range(27)]
    assert rows_in(judging) == [(1, 20), (1, 21), (1, 22), (1, 23)]
    steps = list(learning._steps_of(seen, 16))
    assert [len(step) for step in steps] == [1] * 16
    assert sorted(rows_in(one for step in steps for one in step)) == sorted(rows_in(seen))


def test_few_rows_are_cut_so_that_some_judge() -> None:
    seen, judging = Rows([4]).portions()  # of 48 tokens, far less than a step
    assert (rows_in(seen), rows_in(judging)) == ([(0, 0), (0, 1)], [(0, 2), (0, 3)])
    assert Rows([1]).portions()[1] == []
    assert Rows([4], cut=False).portions()[1] == []
    assert rows_in(Rows([4, 4], cut=False).portions()[1]) == [(1, row) for row in range(4)]
    assert rows_in(Rows([1, 1, 1], padded=[(2, 0)]).portions()[1]) == [(1, 0)]  # padding judges nothing


def test_a_step_takes_several_small_batches_and_no_row_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "STEP_TOKENS", 100)
    seen, judging = Rows([1] * 6).portions()
    assert rows_in(judging) == [(5, 0)]
    assert [sorted(rows_in(step)) for step in learning._steps_of(seen, 3)] == [[(row, 0) for row in range(5)]] * 3
    monkeypatch.setattr(learning, "STEP_TOKENS", 24)
    steps = [rows_in(step) for step in learning._steps_of(seen, 40)]
    assert {len({*step}) for step in steps} == {2}
    monkeypatch.setattr(learning, "STEP_TOKENS", 2)
    assert {len(step) for step in learning._steps_of(seen, 5)} == {1}  # a batch that cannot be cut is one step


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


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_nothing_is_learnt_before_the_first_step(bits: int, symmetric: bool) -> None:
    model, dense = tiny_llama(), tiny_llama()
    quantize(model, replace(GIVEN, bits=bits, symmetric=symmetric), data(model))
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


@pytest.mark.parametrize("zeros_stay", [False, True])
def test_no_gradient_moves_zeros_that_stay(zeros_stay: bool) -> None:
    model, dense = tiny_llama(), tiny_llama()
    hfcompress.prune(dense, hfcompress.Magnitude(sparsity=0.3))
    model.load_state_dict(dense.state_dict())
    quantize(model, GIVEN, data(model))
    layers = packed_layers(model)
    learnt = LearntCodes([(layer, dense.get_submodule(name).weight) for name, layer in layers.items()], zeros_stay)
    for positions in learnt.positions:
        positions.grad = torch.ones_like(positions)
    learnt.hold_fixed_()
    for positions, (name, layer) in zip(learnt.positions, layers.items()):
        zeros = distances(layer) == 0 if zeros_stay else dense.get_submodule(name).weight == 0
        assert torch.equal(positions.grad == 0, zeros)


def test_a_pattern_pruned_in_the_same_pass_stays() -> None:
    model = tiny_llama()
    report = quantize(model, LEARNT, data(model), prune=hfcompress.SparseGPT(pattern="2:4"))
    assert any(row.output_error_after < row.output_error_before for row in report.rows)
    for layer in packed_layers(model).values():
        assert ((layer.dequantize() != 0).view(-1, 4).sum(1) <= 2).all()


@pytest.mark.parametrize("tokens", [24, 384])
def test_padding_counts_neither_in_steps_nor_in_the_check(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "STEP_TOKENS", tokens)
    states, reports = [], []
    for filling in (0, 9):
        model, batches = tiny_llama(), data(tiny_llama())
        for batch in batches:
            batch["attention_mask"][1, 8:] = 0
            batch["attention_mask"][2, 3:] = 0
            batch["input_ids"][batch["attention_mask"] == 0] = filling
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
def test_layers_of_every_family_learn(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "STEP_TOKENS", 200)
    spec = FAMILIES[family]
    model = spec.model()
    report = quantize(model, replace(LEARNT, rounding_steps=10), many_inputs(spec, 24))
    assert all(row.output_error_after <= row.output_error_before for row in report.rows)
    for stack in spec.stacks:
        inside = [row for row in report.rows if row.name.startswith(f"{stack}.")]
        assert any(row.output_error_after < row.output_error_before for row in inside)


def bloom() -> PreTrainedModel:
    """Return a model whose layers are given the heads of all rows in one dimension."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY_SIZE, hidden_size=32, n_layer=2, n_head=4)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "whisper", "bloom"])
def test_parts_of_a_batch_give_what_the_batch_gives(family: str) -> None:
    """Whether a layer's call can be cut or not: what else it is given belongs to some rows or to all."""
    spec = FAMILIES["llama" if family == "bloom" else family]
    model, batches = bloom() if family == "bloom" else spec.model(), many_inputs(spec, 2)
    for batch in batches:
        for name in ("attention_mask", "decoder_attention_mask"):
            if name in batch:
                batch[name] = batch[name].clone()
                batch[name][0, -3:] = 0
    cut = set()
    for visit in walk_layers(model, batches):
        with watching(visit.layer):
            for index in range(len(visit.hidden_states)):
                whole, parts = visit.output(index), visit.parts(index, 1)
                cut.add(len(parts))
                each = [visit.part_output(index, rows) for rows in parts]
                torch.testing.assert_close(torch.cat(each), visit.rows(index, whole))
                for rows, one in zip(parts, each):
                    torch.testing.assert_close(visit.part_of(index, rows, whole), one)
    assert cut == {1 if family == "bloom" else 2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_learns_as_much(dtype: torch.dtype) -> None:
    shares = []
    for one in (torch.float32, dtype):
        model = tiny_llama().to(one)
        row = quantize(model, LEARNT, data(model, 64)).rows[0]
        shares.append(row.output_error_after / row.output_error_before)
    assert shares[1] == pytest.approx(shares[0], abs=0.02)
    assert shares[1] < 0.98


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
    row = {name: one[:1] for name, one in data(model, 1)[0].items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = quantize(model, LEARNT, [row])
    said = [str(one.message) for one in caught if "is not learnt" in str(one.message)]
    assert said[0].startswith(
        "The rounding of model.layers.0 is not learnt: its calibration data cannot be cut in two"
    )
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
