"""Heads and neurons pruned while training: what is closed can go, stays closed, and is gone after `shrink`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from hfcompress.pruning import HeadPruneCallback, NeuronPruneCallback
from hfcompress.pruning.criteria import Random
from hfcompress.pruning.units.bundles import Bundle, close_lowest, head_bundles, neuron_bundles
from hfcompress.pruning.units.criteria import UNIT_CRITERIA
from hfcompress.structure import (
    AttentionSite,
    attach_gates,
    closed_heads,
    closed_neurons,
    find_attention,
    find_ffn,
    plan_heads,
    plan_neurons,
    shrink,
    zero_heads_,
    zero_neurons_,
)
from tests.conftest import tiny_bert
from tests.families import FAMILIES
from tests.pruning_runs import MovesEverything, Rows, class_rows, small_gpt2, small_llama, text_rows, trainer_for

pytestmark = pytest.mark.usefixtures("quick_trainers")
Closed = dict[str, Tensor]


def small_t5() -> PreTrainedModel:
    """A T5 of two layers, whose self-attentions share their position bias and so their heads."""
    model = FAMILIES["t5"].model()
    config = type(model.config)(**{**model.config.to_dict(), "num_layers": 2, "num_decoder_layers": 2})
    torch.manual_seed(0)
    return hf.AutoModelForSeq2SeqLM.from_config(config)


MODELS = {"bert": tiny_bert, "llama": small_llama, "gpt2": small_gpt2, "t5": small_t5}


class WatchUnits(TrainerCallback):
    """Keep the closed heads and neurons after every step, found and read without the callbacks under test."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.attention, self.ffn = find_attention(model), find_ffn(model)
        self.after: dict[int, tuple[Closed, Closed]] = {}

    def closed(self, model: nn.Module) -> tuple[Closed, Closed]:
        heads = {site.name: closed_heads(model, site) for site in self.attention}
        return heads, {site.name: closed_neurons(model, site) for site in self.ffn}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after[state.global_step] = self.closed(kwargs["model"])


def count(closed: Closed) -> int:
    return sum(int(one.sum()) for one in closed.values())


def total(closed: Closed) -> int:
    return sum(len(one) for one in closed.values())


def logits_of(model: PreTrainedModel) -> Tensor:
    ids = torch.stack([row["input_ids"] for row in text_rows(4)])
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **extra).logits


# The whole way


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", MODELS)
def test_half_of_heads_and_neurons_go_and_the_model_reloads(name: str, scope: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    watch = WatchUnits(model)
    callbacks = [HeadPruneCallback(0.5, scope=scope), NeuronPruneCallback(0.5, scope=scope), watch]
    trainer_for(model, tmp_path / "run", callbacks).train()
    heads, neurons = watch.after[10]
    assert count(heads) == total(heads) // 2
    assert count(neurons) == total(neurons) // 2
    assert watch.closed(model)[0].keys() == {site.name for site in find_attention(model)}
    for (heads_before, neurons_before), (heads_after, neurons_after) in pairwise(watch.after.values()):
        for before, after in ((heads_before, heads_after), (neurons_before, neurons_after)):
            assert all(bool(after[site][one].all()) for site, one in before.items())
    assert 0 < count(watch.after[4][1]) < count(watch.after[6][1]) < count(neurons)
    if scope == "layer":
        assert all(int(one.sum()) == len(one) // 2 for one in (*heads.values(), *neurons.values()))

    expected = logits_of(model)
    report = shrink(model)
    assert report.removed_heads == count(heads)
    assert report.removed_neurons == count(neurons)
    model.save_pretrained(tmp_path / "small")
    reloaded = type(model).from_pretrained(tmp_path / "small")
    assert reloaded.num_parameters() == model.num_parameters() < MODELS[name]().num_parameters()
    torch.testing.assert_close(logits_of(reloaded), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits_of(reloaded), logits_of(model))


@pytest.mark.parametrize("grouped", ["whole", "even"])
def test_query_heads_that_share_keys_go_in_groups_or_evenly(grouped: str, tmp_path: Path) -> None:
    model = small_llama()
    watch = WatchUnits(model)
    trainer_for(model, tmp_path, [HeadPruneCallback(0.5, grouped=grouped), watch]).train()
    for closed in watch.after[10][0].values():
        in_groups = closed.reshape(2, 2).sum(1).tolist()
        assert sorted(in_groups) == ([0, 2] if grouped == "whole" else [1, 1])
    shrunk = shrink(model).key_value_heads.values()
    assert [after for _, after in shrunk] == [1, 1] if grouped == "whole" else [2, 2]


# What can go


def _modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    return dict(model.named_modules())


def _sets(sites: list[Any], closed: Tensor, sizes: list[int]) -> Closed:
    return {site.name: one for site, one in zip(sites, closed.split(sizes))}


@pytest.mark.parametrize("grouped", ["whole", "even"])
@pytest.mark.parametrize("family", FAMILIES)
def test_closed_heads_are_heads_that_the_architecture_can_lose(family: str, grouped: str) -> None:
    model = FAMILIES[family].model()
    sites = find_attention(model)
    sizes = [site.heads for site in sites]
    bundles = head_bundles(sites, _modules(model), grouped)
    assert sorted(torch.cat([one.units.flatten() for one in bundles]).tolist()) == list(range(sum(sizes)))
    generator, closed = torch.Generator().manual_seed(0), torch.zeros(sum(sizes), dtype=torch.bool)
    for sparsity in (0.0, 0.13, 0.25, 0.5, 0.6, 0.9, 0.99):
        before, closed = (
            closed,
            close_lowest(bundles, torch.rand(sum(sizes), generator=generator), closed, sparsity, "global"),
        )
        assert bool(closed[before].all())
        assert int(closed.sum()) <= int(sparsity * sum(sizes))
        kept = plan_heads(sites, _sets(sites, closed, sizes))
        open_units = {
            name: tuple((~one).nonzero().flatten().tolist()) for name, one in _sets(sites, closed, sizes).items()
        }
        assert {name: one.units for name, one in kept.items()} == open_units
    assert int(closed.sum()) >= sum(sizes) // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_neurons_are_neurons_that_the_architecture_can_lose(family: str) -> None:
    model = FAMILIES[family].model()
    sites = find_ffn(model)
    sizes = [site.width for site in sites]
    scores = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(0))
    closed = close_lowest(neuron_bundles(sites, _modules(model)), scores, scores < 0, 0.3, "global")
    assert torch.equal(closed, scores <= scores.sort().values[int(0.3 * sum(sizes)) - 1])
    kept = plan_neurons(sites, _sets(sites, closed, sizes))
    assert sum(len(one.units) for one in kept.values()) == int((~closed).sum())


def test_lanes_of_unequal_sizes_never_add_up_to_more_than_asked() -> None:
    bundles = [Bundle(torch.arange(12).reshape(2, 3, 2), 1), Bundle(torch.arange(12, 17).reshape(1, 5, 1), 0)]
    for seed in range(20):
        scores = torch.rand(17, generator=torch.Generator().manual_seed(seed))
        closed = torch.zeros(17, dtype=torch.bool)
        closed[seed % 17] = True
        for share in range(17):
            closed = close_lowest(bundles, scores, closed, share / 17, "global")
            assert int(closed.sum()) <= max(1, share)
            items = closed[:12].reshape(2, 3, 2)
            whole = items.all(2).sum(1)
            assert int((whole - whole.min()).sum()) == 0 or seed < 12
        assert int(closed[:12].sum()) <= 9
        assert int(closed.sum()) >= 16 - 4 - 3


# What is scored


def _padded_rows() -> Rows:
    rows = class_rows(8)
    for index, row in enumerate(rows):
        padding = index % 5
        row["attention_mask"] = torch.tensor([1] * (8 - padding) + [0] * padding)
        row["input_ids"] = row["input_ids"].where(row["attention_mask"] != 0, 0)
    return rows


def _expected_scores(criterion: str, kind: str, rows: Rows) -> Tensor:
    """Score every unit of a fresh model by definition, not by the columns of its weights."""
    model = tiny_bert().train()
    sites: list[Any] = find_attention(model) if kind == "heads" else find_ffn(model)
    readers = [site.output if isinstance(site, AttentionSite) else site.down for site in sites]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if criterion == "taylor":
        gates = attach_gates(model, **{"attention" if kind == "heads" else "ffn": sites})
        model(**batch).loss.backward()
        return torch.cat([gate.values.grad.abs() for gate in getattr(gates, kind).values()])
    if criterion == "magnitude":
        weights = [model.get_submodule(part.name).weight for part in readers]
        return torch.cat(
            [weight[:, part.features].square().sum((0, 2)).sqrt() for weight, part in zip(weights, readers)]
        )
    if criterion == "random":
        draws = [Random(42).scores(f"{part.name}.weight", torch.zeros(len(part)), {}) for part in readers]
        return torch.cat(draws)
    found, keep = [], batch["attention_mask"].bool()
    for part in readers:
        model.get_submodule(part.name).register_forward_pre_hook(
            lambda module, args, part=part: found.append(args[0][keep][:, part.features].square().sum(2).mean(0))
        )
    with torch.no_grad():
        model(**batch)
    by_reader = {len(part): index for index, part in enumerate(readers)}
    assert len(found) == len(readers) >= len(by_reader)
    return torch.cat(found)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("kind", ["heads", "neurons"])
# tests/test_unit_criteria.py does the same with what these criteria watch.
@pytest.mark.parametrize("criterion", sorted(UNIT_CRITERIA.keys() - {"entropy", "mutual_information"}))
def test_lowest_scores_by_definition_are_closed(criterion: str, kind: str, scope: str, tmp_path: Path) -> None:
    model, rows = tiny_bert(), _padded_rows()
    callback_type = HeadPruneCallback if kind == "heads" else NeuronPruneCallback
    watch = WatchUnits(model)
    callback = callback_type(0.5, criterion=criterion, scope=scope, schedule="oneshot", start=0.0)
    trainer_for(
        model, tmp_path, [callback, watch], rows=rows, max_steps=1, learning_rate=0.0, per_device_train_batch_size=8
    ).train()
    closed = watch.after[1][0 if kind == "heads" else 1]
    scores = _expected_scores(criterion, kind, rows)
    parts = [scores] if scope == "global" else list(scores.split([len(one) for one in closed.values()]))
    expected = torch.cat([one <= one.sort().values[len(one) // 2 - 1] for one in parts])
    assert torch.equal(torch.cat(list(closed.values())), expected)


def test_normalized_scores_compare_units_within_their_layers_first(tmp_path: Path) -> None:
    shares = []
    for normalize in (False, True):
        model = tiny_bert()
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.weight.mul_(1e-2)
        watch = WatchUnits(model)
        callback = NeuronPruneCallback(0.5, criterion="magnitude", normalize=normalize, end=0.2)
        trainer_for(model, tmp_path, [callback, watch], max_steps=5, learning_rate=0.0).train()
        shares.append([float(one.float().mean()) for one in watch.after[5][1].values()])
    assert shares[0] == [1.0, 0.0]
    assert 0.3 < shares[1][0] < 0.7


# Closed means closed


@pytest.mark.parametrize("optimizer", ["adamw", "moves-everything"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_closed_columns_are_exactly_zero_and_have_no_moments(name: str, optimizer: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    options: dict[str, Any] = {"weight_decay": 0.1}
    if optimizer != "adamw":
        options["optimizers"] = (MovesEverything(model.parameters()), None)
    watch = WatchUnits(model)
    callbacks = [HeadPruneCallback(0.5, end=0.5), NeuronPruneCallback(0.5, end=0.5), watch]
    trainer = trainer_for(model, tmp_path, callbacks, **options)
    trainer.train()
    assert [count(watch.after[step][0]) for step in (5, 10)] == [4, 4]
    assert [count(watch.after[step][1]) for step in (5, 10)] == [total(watch.after[5][1]) // 2] * 2
    if optimizer == "adamw":
        readers = [site.output for site in watch.attention] + [site.down for site in watch.ffn]
        for part in readers:
            weight = model.get_submodule(part.name).weight
            moments = trainer.optimizer.state[weight]["exp_avg"]
            assert bool((weight == 0).any())
            assert not moments[weight == 0].any()
            assert moments[weight != 0].any()


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_units_that_are_closed_already_stay_closed_and_count(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    watch = WatchUnits(model)
    for site in watch.attention:
        zero_heads_(model, site, range(site.group_size))
    for block in watch.ffn:
        zero_neurons_(model, block, range(3, 20))
    before = watch.closed(model)
    trainer_for(model, tmp_path, [HeadPruneCallback(0.5), NeuronPruneCallback(0.5), watch]).train()
    for old, new in zip(before, watch.after[10]):
        assert all(bool(new[site][one].all()) for site, one in old.items())
        assert count(new) == total(new) // 2 >= count(old) > 0


def test_share_of_zero_only_keeps_what_is_closed(tmp_path: Path) -> None:
    model = tiny_bert()
    watch = WatchUnits(model)
    zero_heads_(model, watch.attention[0], [1, 2])
    trainer_for(model, tmp_path, [HeadPruneCallback(0.0), watch]).train()
    assert {count(heads) for heads, _ in watch.after.values()} == {2}


# Excluded


@pytest.mark.parametrize("pattern", ["bert.encoder.layer.1", "*.layer.1.*"])
def test_excluded_layers_keep_everything(pattern: str, tmp_path: Path) -> None:
    model = tiny_bert()
    watch = WatchUnits(model)
    callbacks = [HeadPruneCallback(0.5, exclude=(pattern,)), NeuronPruneCallback(0.5, exclude=(pattern,)), watch]
    trainer_for(model, tmp_path, callbacks).train()
    for closed in watch.after[10]:
        first, second = closed.values()
        assert [int(first.sum()), int(second.sum())] == [len(first) // 2, 0]


def test_attentions_that_share_heads_are_excluded_together(tmp_path: Path) -> None:
    model = small_t5()
    watch = WatchUnits(model)
    callback = HeadPruneCallback(0.5, exclude=("encoder.block.1.*",))
    trainer_for(model, tmp_path, [callback, watch]).train()
    closed = watch.after[10][0]
    assert not any(bool(one.any()) for name, one in closed.items() if name.startswith("encoder."))
    assert count(closed) == sum(len(one) for name, one in closed.items() if name.startswith("decoder.")) // 2
