"""Gradient steps tune scales by what the whole model gives, and by nothing else."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hfcompress
from hfcompress.errors import ModelError
from hfcompress.packed import packed_layers
from hfcompress.quantization import GPTQ, quantize
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.tuning import steps
from hfcompress.quantization.tuning.portions import held_back, portions
from hfcompress.quantization.tuning.scales import TunedScales, _Values, distances
from tests.conftest import tiny_llama
from tests.families import FAMILIES, Family, inputs_of

pytestmark = pytest.mark.usefixtures("few_tokens_are_fine")

ROUGH = GPTQ(bits=2, group_size=16)
TUNED = replace(ROUGH, tuning_steps=16)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "STEP_TOKENS", 48)
    monkeypatch.setattr(steps, "RATE", 4e-2)


def data(model: PreTrainedModel, count: int = 16, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(6, model.config.vocab_size, (count, 4, 12), generator=generator)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows]


def divergence(model: PreTrainedModel, dense: PreTrainedModel, batches: list[dict[str, Tensor]]) -> float:
    total = 0.0
    for batch in batches:
        with torch.no_grad():
            own, wanted = (one(**batch).logits.double().log_softmax(-1) for one in (model, dense))
        total += float(nn.functional.kl_div(own, wanted, reduction="sum", log_target=True))
    return total / sum(batch["input_ids"].numel() for batch in batches)


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight_scale.clone() for name, layer in packed_layers(model).items()}


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_stay_and_text_it_never_saw_comes_nearer(symmetric: bool) -> None:
    dense = tiny_llama()
    plain, tuned = copy.deepcopy(dense), copy.deepcopy(dense)
    quantize(plain, replace(ROUGH, symmetric=symmetric), held_back(data(dense))[0])
    report = quantize(tuned, replace(TUNED, symmetric=symmetric), data(dense))
    done = report.tuning
    assert done is not None
    assert (done.measure, done.kept, done.steps) == ("KL divergence", True, 13)
    assert done.after < 0.95 * done.before
    unseen = data(dense, seed=1)
    assert divergence(tuned, dense, unseen) < 0.95 * divergence(plain, dense, unseen)
    for name, layer in packed_layers(tuned).items():
        other = packed_layers(plain)[name]
        assert torch.equal(distances(layer), distances(other))
        assert not torch.equal(layer.weight_scale, other.weight_scale)
        assert torch.equal(layer.weight_scale > 0, other.weight_scale > 0)


def test_what_is_reported_is_what_rows_that_no_step_saw_give() -> None:
    dense, batches = tiny_llama(), data(tiny_llama())
    plain, tuned = copy.deepcopy(dense), copy.deepcopy(dense)
    rest, unseen = held_back(batches)
    quantize(plain, ROUGH, rest)
    done = quantize(tuned, TUNED, batches).tuning
    assert done is not None
    assert done.before == pytest.approx(divergence(plain, dense, unseen), rel=1e-4)
    assert done.after == pytest.approx(divergence(tuned, dense, unseen), rel=1e-4)
    rows = [tuple(row) for part in (*rest, *unseen) for row in part["input_ids"].tolist()]
    assert len(rows) == len(set(rows)) == 64
    assert sum(len(part["input_ids"]) for part in unseen) == 4
    parts = [part for step in steps._steps_of(rest, 4) for part in step]
    assert sorted(tuple(row) for part in parts for row in part["input_ids"].tolist()) == sorted(rows[:60])


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_have_the_gradient_of_their_product_with_the_codes(symmetric: bool) -> None:
    codes = torch.randint(-8, 8, (6, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    codes = codes if symmetric else codes.short() + 9
    scale = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda one: _Values.apply(codes, one), scale)


def test_a_change_is_a_share_of_the_rounding_error() -> None:
    """One rate is for all bits: a step moves scales of fewer bits farther."""
    models = {bits: tiny_llama() for bits in (2, 4)}
    for bits, model in models.items():
        quantize(model, replace(ROUGH, bits=bits), data(model, 1))
    layers = [layer for model in models.values() for layer in packed_layers(model).values()]
    before, scales = [layer.weight_scale.clone() for layer in layers], TunedScales(layers)
    for change in scales.changes:
        nn.init.ones_(change)
    scales.write_()
    for layer, scale in zip(layers, before):
        torch.testing.assert_close(layer.weight_scale, scale * {2: 1.25, 4: 1.0625}[layer.bits])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_goes_where_plain_autograd_would(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that run once more for their gradients, and logits in chunks, change nothing."""
    dense = FAMILIES[family].model()
    model, batches = copy.deepcopy(dense), data(dense, 2)
    quantize(model, ROUGH, batches)
    found: list[list[Tensor]] = []
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda self: found.append([one.grad.clone() for one in self.param_groups[0]["params"]]),
    )
    planned = [PlannedLinear(name, dense.get_submodule(name), 2, 16, 16) for name in packed_layers(model)]
    steps.tune_scales_(model, planned, batches[:1], batches[1:], 48, 1)
    changes, weights = [], {}
    for name, layer in packed_layers(model).items():
        change = torch.zeros_like(layer.weight_scale, requires_grad=True)
        scale = (layer.weight_scale * (1 + change / 4)).repeat_interleave(layer.columns // change.shape[1], 1)
        weights[f"{name}.weight"] = distances(layer) * scale
        changes.append(change)
    seen = batches[0]
    own = torch.func.functional_call(copy.deepcopy(dense), weights, kwargs=seen).logits.log_softmax(-1)
    wanted = dense(**seen).logits.log_softmax(-1).detach()
    nn.functional.kl_div(own, wanted, reduction="sum", log_target=True).backward()
    assert len(found[0]) == len(changes)
    for gradient, change in zip(found[0], changes):
        torch.testing.assert_close(gradient, change.grad, rtol=1e-3, atol=1e-5)


def test_scales_stay_where_rows_that_no_step_saw_gain_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, tuned = tiny_llama(), tiny_llama()
    quantize(plain, ROUGH, held_back(data(plain))[0])
    monkeypatch.setattr(steps, "RATE", 12.0)
    report = quantize(tuned, TUNED, data(plain))
    assert report.tuning is not None
    assert not report.tuning.kept
    assert report.tuning.after >= report.tuning.before
    assert all(torch.equal(one, scales_of(tuned)[name]) for name, one in scales_of(plain).items())


def test_nothing_but_scales_is_touched() -> None:
    model = tiny_llama().train()
    model.config.use_cache = True
    model.model.norm.weight.requires_grad_(False)
    kept = {
        name: one.detach().clone() for name, one in model.named_parameters() if "layers" not in name or "norm" in name
    }
    flags = {name: one.requires_grad for name, one in model.named_parameters() if name in kept}
    quantize(model, TUNED, data(model))
    now = dict(model.named_parameters())
    assert all(torch.equal(one, now[name]) and now[name].grad is None for name, one in kept.items())
    assert {name: one.requires_grad for name, one in now.items()} == flags
    assert all(module.training for module in model.modules())
    assert model.config.use_cache
    assert all("forward" not in vars(module) and "dequantize" not in vars(module) for module in model.modules())


def test_a_failure_brings_the_dense_model_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    calls = 0

    def fail(self: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, TUNED, data(model))
    assert not packed_layers(model)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(one.requires_grad for one in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())


def test_pruned_weights_stay_zero() -> None:
    model = tiny_llama()
    hfcompress.prune(model, hfcompress.Magnitude(sparsity=0.5))
    zeros = {name: model.get_submodule(name).weight == 0 for name in hfcompress.structure.stack_linears(model)}
    report = quantize(model, TUNED, data(model))
    assert report.tuning is not None
    assert report.tuning.kept
    for name, layer in packed_layers(model).items():
        assert not layer.dequantize()[zeros[name]].any()


def test_padding_counts_neither_in_steps_nor_in_the_check() -> None:
    tuned: list[dict[str, Tensor]] = []
    reports = []
    for filling in (0, 9):
        model, batches = tiny_llama(), data(tiny_llama())
        for batch in batches:
            batch["attention_mask"][::2, 8:] = 0
            batch["input_ids"][::2, 8:] = filling
        reports.append(replace(quantize(model, TUNED, batches).tuning, seconds=0))
        tuned.append(scales_of(model))
    assert reports[0] == reports[1]
    assert all(torch.equal(one, tuned[1][name]) for name, one in tuned[0].items())


def test_batches_of_several_steps_make_the_same_steps() -> None:
    tuned = []
    whole = {
        name: torch.cat([batch[name] for batch in data(tiny_llama())]) for name in ("input_ids", "attention_mask")
    }
    for rows in (4, 8, 64):
        model = tiny_llama()
        names = list(hfcompress.structure.stack_linears(model))
        quantize(model, ROUGH, data(model))
        dense = tiny_llama()
        planned = [PlannedLinear(name, dense.get_submodule(name), 2, 16, 16) for name in names]
        batches = [{name: values[at : at + rows] for name, values in whole.items()} for at in range(0, 64, rows)]
        steps.tune_scales_(model, planned, batches, data(dense, 2, seed=1), 64 * 12, 8)
        tuned.append(scales_of(model))
    for other in tuned[1:]:
        assert all(torch.equal(one, other[name]) for name, one in tuned[0].items())


def test_a_batch_whose_parts_cannot_be_told_apart_stays_whole() -> None:
    ids = torch.arange(24).view(4, 6)
    assert [len(one["input_ids"]) for one in portions([{"input_ids": ids}], 3)] == [3, 1]
    images = {"input_ids": ids, "pixel_values": torch.zeros(7, 3)}
    assert portions([images], 1) == [images]
    assert [one["use"] for one in portions([{"input_ids": ids, "use": "this"}], 2)] == ["this", "this"]


MEASURES = {"llama": "KL divergence", "gpt2": "KL divergence", "t5": "KL divergence", "whisper": "KL divergence",
            "bert": "squared error", "vit": "squared error", "clip": "squared error"}  # fmt: skip


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_comes_nearer_to_its_dense_model(family: str) -> None:
    spec = FAMILIES[family]
    dense, batches = spec.model(), many_inputs(spec)
    model = copy.deepcopy(dense)
    done = quantize(model, TUNED, batches).tuning
    assert done is not None
    assert done.kept
    assert done.after < done.before
    assert done.measure == MEASURES.get(family, done.measure)


def many_inputs(family: Family, count: int = 32) -> list[dict[str, Tensor]]:
    """Return the family's inputs with other values each time."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        batch = inputs_of(family)
        for name, value in batch.items():
            if value.is_floating_point():
                batch[name] = torch.randn(value.shape, generator=generator)
            elif name != "attention_mask":
                batch[name] = torch.randint(6, 32, value.shape, generator=generator)
        found.append(batch)
    return found


def test_gradients_are_taken_wherever_it_is_called() -> None:
    outside, inside = tiny_llama(), tiny_llama()
    quantize(outside, TUNED, data(outside))
    with torch.no_grad():
        quantize(inside, TUNED, data(inside))
    assert all(torch.equal(one, scales_of(inside)[name]) for name, one in scales_of(outside).items())
    with torch.inference_mode(), pytest.raises(ModelError, match=r"outside torch.inference_mode.* tuning_steps=0"):
        quantize(tiny_llama(), TUNED, data(inside))


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        (GPTQ(bits=3, quality="best"), 32),
        (GPTQ(bits=2, quality="best"), 32),
        (GPTQ(bits="auto", average_bits=3.75, quality="best"), 32),
        (GPTQ(bits="auto", average_bits=4, quality="best"), 0),
        (GPTQ(bits="auto", megabytes=1, quality="best"), 0),
        (GPTQ(bits=4, quality="best"), 0),
        (GPTQ(bits=3), 0),
        (GPTQ(bits=3, quality="best", tuning_steps=0), 0),
        (GPTQ(bits=8, tuning_steps=7), 7),
    ],
)
def test_best_tunes_coarse_codes(method: GPTQ, steps: int) -> None:
    assert method.gradient_steps == steps


def test_nothing_is_tuned_without_steps_or_without_rows_to_judge() -> None:
    model = tiny_llama()
    assert quantize(tiny_llama(), ROUGH, data(model)).tuning is None
    assert quantize(tiny_llama(), TUNED, data(model)[:1]).tuning is None  # too few rows to hold one back


def test_the_checkpoint_holds_the_tuned_scales(tmp_path: Path) -> None:
    model = tiny_llama()
    quantize(model, TUNED, data(model))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = data(model, 1, seed=3)[0]
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
