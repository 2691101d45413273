"""Pruning beside what else a Trainer does: patterns, compiled models, reports, several callbacks, sparse models."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
)
from transformers.integrations import integration_utils

from hfcompress.errors import HFCompressError, ModelError
from hfcompress.pruning import HeadPruneCallback, NeuronPruneCallback, PruneCallback
from hfcompress.pruning.criteria import CRITERIA
from hfcompress.pruning.masks import prunable_weights, prune_masks_
from hfcompress.pruning.oneshot import Magnitude, prune
from hfcompress.pruning.patterns import Blocks, NofM, parse_pattern
from hfcompress.quantization import RTN, quantize
from hfcompress.structure import shrink
from tests.conftest import VOCABULARY_SIZE, tiny_bert
from tests.pruning_runs import (
    StopAt,
    Watch,
    class_rows,
    count_zeros,
    half_of,
    matrices,
    same_tensors,
    share_of,
    small_gpt2,
    small_llama,
    state_of,
    trainer_for,
    zeros_of,
)

pytestmark = pytest.mark.usefixtures("quick_trainers")

# Patterns


def _by_unit(zero: Tensor, pattern: NofM | Blocks) -> Tensor:
    """Return the zeros as (units, weights of a unit); zero: (outputs, inputs)."""
    if isinstance(pattern, NofM):
        return zero.reshape(-1, pattern.group)
    columns = pattern.columns or zero.shape[1]
    return zero.unflatten(1, (-1, columns)).unflatten(0, (-1, pattern.rows)).transpose(1, 2).flatten(0, 1).flatten(1)


@pytest.mark.parametrize(
    ("criterion", "scope"), [("magnitude", "global"), ("movement", "layer"), ("activation", "global")]
)
@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "4x1", "1x8", "row"])
@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_pattern_holds_at_every_step(
    make: Callable[[], PreTrainedModel], text: str, criterion: str, scope: str, tmp_path: Path
) -> None:
    model, watch, pattern = make(), Watch(), parse_pattern(text)
    target = pattern.sparsity if isinstance(pattern, NofM) else 0.5
    callback = PruneCallback(sparsity=target, pattern=text, criterion=criterion, scope=scope, end=0.6)
    trainer_for(model, tmp_path, [callback, watch], max_steps=6).train()
    for step, zeros in watch.after.items():
        for zero in zeros.values():
            units = _by_unit(zero.t() if make is small_gpt2 else zero, pattern)
            if isinstance(pattern, Blocks):
                assert torch.equal(units.all(1), units.any(1)), step
            else:
                wanted = pattern.group - pattern.kept
                assert int(units.sum(1).max()) <= wanted
                assert step < 4 or int(units.sum(1).min()) == wanted
    assert same_tensors(watch.after[4], watch.after[6])
    assert 0 < share_of(watch.after[1]) < share_of(watch.after[2]) < share_of(watch.after[6]) <= target
    assert share_of(watch.after[6]) > target - 0.02


@pytest.mark.parametrize("text", ["3:7", "5x1", "1x7"])
def test_pattern_that_does_not_divide_is_refused_with_names(text: str, tmp_path: Path) -> None:
    pattern = parse_pattern(text)
    sparsity = pattern.sparsity if isinstance(pattern, NofM) else 0.5
    model = small_llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = trainer_for(model, tmp_path, [PruneCallback(sparsity=sparsity, pattern=text)])
    with pytest.raises(ModelError, match=rf"pattern='{text}' does not divide 'model\.layers\.0.* and 11 more"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert same_tensors(before, model.state_dict())


def test_pattern_of_conv1d_runs_along_its_inputs(tmp_path: Path) -> None:
    # 32 inputs and 96 outputs: 64 divides neither, 96 only the outputs
    callback = PruneCallback(sparsity=0.5, pattern="48:96", targets=("*.c_attn",))
    with pytest.raises(ModelError, match=r"c_attn\.weight \(96 x 32\)'"):
        trainer_for(small_gpt2(), tmp_path, [callback]).train()


@pytest.mark.parametrize("sparsity", [0.3, 0.75])
def test_sparsity_that_contradicts_the_pattern_is_refused(sparsity: float) -> None:
    with pytest.raises(
        HFCompressError, match=r"pattern='2:4' sets 2 of every 4 weights to zero; give sparsity=0.5 with"
    ):
        PruneCallback(sparsity=sparsity, pattern="2:4")
    with pytest.raises(HFCompressError, match="pattern '2:2' keeps 2 of every 2"):
        PruneCallback(pattern="2:2")


# Schedules


def test_oneshot_prunes_once_after_its_start(tmp_path: Path) -> None:
    model, watch = tiny_bert(), Watch()
    trainer_for(model, tmp_path, [PruneCallback(schedule="oneshot", start=0.4), watch]).train()
    counts = [count_zeros(watch.after[step]) for step in range(1, 11)]
    assert counts == [0] * 4 + [half_of(model)] * 6


def test_constant_prunes_before_the_first_step(tmp_path: Path) -> None:
    model, watch = tiny_bert(), Watch()
    smallest = torch.cat([weight.abs().flatten() for weight in matrices(model).values()]).sort().values
    expected = {n: w.abs() <= smallest[half_of(model) - 1] for n, w in matrices(model).items()}
    callback = PruneCallback(schedule="constant")
    trainer_for(model, tmp_path, [callback, watch], eval_on_start=True).train()
    assert same_tensors(watch.evaluated[0], expected)
    for zeros in watch.after.values():
        assert same_tensors(zeros, expected)


def test_learning_rate_that_restarts_is_left_to_the_trainer(tmp_path: Path) -> None:
    """Whenever the rate is high again, weights move most: masks hold, and the schedule does not start anew."""
    model, watch = tiny_bert(), Watch()
    trainer = trainer_for(
        model, tmp_path, [PruneCallback(schedule="linear", end=1.0), watch], max_steps=12,
        lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 3},
    )  # fmt: skip
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [rates.count(max(rates)), rates[4] > rates[3], rates[8] > rates[7]] == [3, True, True]
    assert [count_zeros(watch.after[step]) for step in range(1, 13)] == [
        int(step / 12 * half_of(model) + 1e-6) for step in range(1, 13)
    ]
    for before, after in pairwise(watch.after.values()):
        assert all(bool((after[name] | ~zero).all()) for name, zero in before.items())


# Memory


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_take_a_byte_a_weight_and_thresholds_sort_a_sliver(
    scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_bert(hidden_size=256, intermediate_size=1024)
    weights, sorted_sizes, held = matrices(model), [], []
    sort = torch.Tensor.sort

    def watched_sort(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        sorted_sizes.append(self.numel())
        return sort(self, *args, **kwargs)

    class Held(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # What the callback keeps lies in its own attributes and, for evidence, in the optimizer.
            held.append(sum(one.numel() * one.element_size() for one in _tensors_in(vars(callback))))

    monkeypatch.setattr(torch.Tensor, "sort", watched_sort)
    monkeypatch.setattr(torch, "sort", lambda one, *args, **kwargs: watched_sort(one, *args, **kwargs))
    callback = PruneCallback(scope=scope)
    trainer_for(model, tmp_path, [callback, Held()], max_steps=2, rows=class_rows(8)).train()
    total = sum(weight.numel() for weight in weights.values())
    assert held == [total, total]
    assert sorted_sizes
    assert max(sorted_sizes) < 0.05 * total


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [tensor for one in inside for tensor in _tensors_in(one)]


# Sparse models


def _sparse(make: Callable[[], PreTrainedModel], share: float) -> PreTrainedModel:
    model = make()
    generator = torch.Generator().manual_seed(3)
    for weight in matrices(model).values():
        weight.mul_(torch.rand(weight.shape, generator=generator) > share)
    return model


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.0}, {"sparsity": 0.6, "schedule": "constant"}, {"sparsity": 0.5, "criterion": "taylor"}]
)
@pytest.mark.parametrize("make", [small_llama, tiny_bert, small_gpt2])
def test_sparse_model_is_trained_further_without_a_change_of_its_zeros(
    make: Callable[[], PreTrainedModel], options: dict[str, Any], tmp_path: Path
) -> None:
    model, watch = _sparse(make, 0.61), Watch()
    before = {name: weight.clone() for name, weight in matrices(model).items()}
    trainer_for(model, tmp_path, [PruneCallback(**options), watch]).train()
    for zeros in watch.after.values():
        assert same_tensors(zeros, zeros_of(before))
    assert all(not torch.equal(weight, before[name]) for name, weight in matrices(model).items())


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(
    ("sparsity", "pattern"), [(0.8, None), (0.8, "4x1"), (0.8, "row"), (0.5, "2:4"), (0.25, "3:4")]
)
def test_zeros_of_a_sparse_model_stay_while_it_is_pruned(
    sparsity: float, pattern: str | None, criterion: str, tmp_path: Path
) -> None:
    model, watch = _sparse(small_llama, 0.4), Watch()
    before = zeros_of(matrices(model))
    callback = PruneCallback(sparsity=sparsity, pattern=pattern, criterion=criterion, end=0.5)
    trainer_for(model, tmp_path, [callback, watch], max_steps=6).train()
    for zeros in watch.after.values():
        assert all(bool(zeros[name][zero].all()) for name, zero in before.items())
    final = watch.after[6]
    if sparsity == 0.8:
        # Blocks of 4, or rows of 64 inputs at most, go together; zeros in blocks that stay count, too.
        wanted = int(0.8 * sum(one.numel() for one in final.values()))
        assert wanted - {None: 0, "4x1": 3, "row": 63}[pattern] <= count_zeros(final) <= wanted
    for name, zero in final.items():
        if pattern in ("2:4", "3:4"):
            parsed = parse_pattern(pattern)
            assert isinstance(parsed, NofM)
            inside, old = (_by_unit(one, parsed).sum(1) for one in (zero, before[name]))
            assert torch.equal(inside, old.clamp_min(parsed.group - parsed.kept))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("text", ["4x1", "4x4", "row"])
def test_blocks_of_sparse_masks_never_exceed_what_is_asked(text: str, scope: str) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(64, 32, generator=generator) > 0.6 for name in "ab"}
    scores = {name: torch.rand(64, 32, generator=generator) for name in "ab"}
    before = {name: ~mask for name, mask in masks.items()}
    pattern = parse_pattern(text)
    assert isinstance(pattern, Blocks)
    for sparsity in (0.5, 0.7, 0.8):
        prune_masks_(masks, scores.__getitem__, sparsity, scope, pattern)
        zeros = {name: ~mask for name, mask in masks.items()}
        groups = [zeros] if scope == "global" else [{name: zero} for name, zero in zeros.items()]
        for group in groups:
            wanted = max(int(sparsity * 64 * 32 * len(group)), count_zeros({name: before[name] for name in group}))
            assert wanted - pattern.size(32) < count_zeros(group) <= wanted
        for name, zero in zeros.items():
            units, old = _by_unit(zero, pattern), _by_unit(before[name], pattern)
            assert bool((units.all(1) | (units == old).all(1)).all())


def test_moments_of_zeros_that_were_trained_without_the_callback_are_cleared(tmp_path: Path) -> None:
    class Freeze(TrainerCallback):  # weights at zero with moments that are not
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for weight in matrices(kwargs["model"]).values():
                weight.view(-1)[::3] = 0

    trainer_for(tiny_bert(), tmp_path, [Freeze(), StopAt(5)], save_strategy="steps", save_steps=5).train()
    model, watch = tiny_bert(), Watch()
    trainer = trainer_for(model, tmp_path, [PruneCallback(sparsity=0.0), watch, StopAt(6)])
    trainer.train(resume_from_checkpoint=True)
    assert count_zeros(watch.after[6]) >= sum((one.numel() + 2) // 3 for one in watch.after[6].values())
    for name, weight in model.named_parameters():
        if name in matrices(model):
            assert not trainer.optimizer.state[weight]["exp_avg"][weight == 0].any()
            assert trainer.optimizer.state[weight]["exp_avg"][weight != 0].any()


def test_matrix_that_is_all_zero_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = small_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    with caplog.at_level(logging.WARNING, logger="hfcompress"):
        trainer_for(model, tmp_path, [PruneCallback], max_steps=1).train()
    (message,) = [record.message for record in caplog.records if "all zero" in record.message]
    assert "'model.layers.1.mlp.up_proj.weight'" in message


# Compiled models


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("criterion", ["magnitude", "movement", "activation"])
def test_compiled_model_is_pruned_as_the_plain_one(criterion: str, backend: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    found, watches = [], []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        model, watch = tiny_bert(layers=1), Watch()
        callback = PruneCallback(criterion=criterion, frequency=2, end=0.8)
        trainer = trainer_for(
            model, tmp_path, [callback, watch], max_steps=5, learning_rate=1e-3, rows=class_rows(8),
            save_strategy="steps", save_steps=5, **options,
        )  # fmt: skip
        trainer.train()
        assert bool(options) == isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
        found.append(matrices(model))
        watches.append(watch)
    torch.compiler.reset()
    for step in range(1, 6):
        plain, compiled = (one.after[step] for one in watches)
        assert count_zeros(plain) == count_zeros(compiled)
        assert sum(int((plain[name] ^ compiled[name]).sum()) for name in plain) <= 2
    assert count_zeros(watches[0].after[5]) == half_of(model)
    for name, weight in found[0].items():
        assert float((weight - found[1][name]).abs().mean()) < 1e-4


def test_model_that_comes_compiled_is_pruned(tmp_path: Path) -> None:
    torch.compiler.reset()
    model = tiny_bert(layers=1)
    compiled = torch.compile(model, backend="eager")
    trainer_for(
        compiled, tmp_path, [PruneCallback], rows=class_rows(8), max_steps=3, remove_unused_columns=False
    ).train()
    torch.compiler.reset()
    assert count_zeros(zeros_of(matrices(model))) == half_of(model)


# Reports


class Recorder(TrainerCallback):
    """What a tracker sees: on_log, at the trackers' place before a user's own callbacks."""

    seen: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        Recorder.seen.append((state.global_step, dict(logs)))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "seen", [])
    return Recorder


def _share(weights: dict[str, Tensor], part: str = "") -> float:
    inside = [weight for name, weight in weights.items() if part in name]
    return sum(int((weight == 0).sum()) for weight in inside) / sum(weight.numel() for weight in inside)


def test_model_without_a_stack_of_layers_reports_no_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    )
    rows = [{"pixel_values": torch.rand(3, 32, 32), "labels": torch.tensor(index % 2)} for index in range(4)]
    trainer = trainer_for(model, tmp_path, [PruneCallback(targets=("Conv2d",))], rows=rows, max_steps=2)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "sparsity" in entry]
    assert entry["sparsity"] == pytest.approx(0.5, abs=0.001)
    assert not [name for name in entry if name.startswith("sparsity/")]
    with pytest.raises(ModelError, match=r"No weight matches targets=\['\*\.query'\].*resnet\.embedder"):
        prunable_weights(model, ("*.query",))


@pytest.mark.parametrize("change", ["quantize", "shrink"])
def test_evaluation_after_the_model_was_changed_logs_what_is_there(change: str, tmp_path: Path) -> None:
    model = small_llama()
    callbacks = [PruneCallback(0.3), HeadPruneCallback(0.5), NeuronPruneCallback(0.5)]
    trainer = trainer_for(model, tmp_path, callbacks, max_steps=2)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert {"sparsity", "heads_pruned", "neurons_pruned"} <= trainer.state.log_history[-1].keys()
    if change == "quantize":
        quantize(model, RTN(bits=8))
    else:
        shrink(model)
    assert trainer.evaluate()["eval_loss"] > 0
    logged = {name for name in trainer.state.log_history[-1] if not name.startswith("eval_")}
    assert logged.isdisjoint({"sparsity", "heads_pruned", "neurons_pruned"}) == (change == "quantize")


def test_trackers_get_the_sparsity_of_every_layer_at_every_evaluation(
    recorder: type[Recorder], tmp_path: Path
) -> None:
    model, watch = small_llama(), Watch()
    trainer = trainer_for(
        model,
        tmp_path,
        [PruneCallback(scope="global"), watch],
        report_to="recorder",
        eval_strategy="steps",
        eval_steps=5,
    )
    trainer.train()
    reports = {step: logs for step, logs in recorder.seen if "sparsity" in logs}
    assert list(reports) == [5, 10]
    for step, logs in reports.items():
        zeros = {name: 1.0 - zero.float() for name, zero in watch.after[step].items()}
        assert set(logs) == {"sparsity", "sparsity/model.layers.0", "sparsity/model.layers.1"}
        assert logs["sparsity"] == pytest.approx(_share(zeros))
        for layer in ("model.layers.0", "model.layers.1"):
            assert logs[f"sparsity/{layer}"] == pytest.approx(_share(zeros, layer))
        (entry,) = [e for e in trainer.state.log_history if e["step"] == step and "eval_loss" in e]
        assert {name: entry[name] for name in logs} == logs
    assert reports[5]["sparsity/model.layers.0"] != reports[5]["sparsity/model.layers.1"]


def test_several_callbacks_report_under_names_of_their_own(recorder: type[Recorder], tmp_path: Path) -> None:
    model = small_llama()
    callbacks = [PruneCallback(0.25, targets=("*.self_attn.*",)), PruneCallback(0.75, targets=("*.mlp.*",))]
    trainer = trainer_for(model, tmp_path, callbacks, report_to="recorder", eval_strategy="steps", eval_steps=10)
    trainer.train()
    logs = {name: value for step, one in recorder.seen if step == 10 for name, value in one.items()}
    weights = matrices(model)
    assert logs["sparsity_1"] == pytest.approx(_share(weights, "self_attn"))
    assert logs["sparsity_2"] == pytest.approx(_share(weights, "mlp"))
    assert logs["sparsity_2/model.layers.1"] == pytest.approx(
        _share({n: w for n, w in weights.items() if "layers.1." in n}, "mlp")
    )
    assert "sparsity" not in logs


# Several callbacks


def test_several_callbacks_resume_bit_for_bit(tmp_path: Path) -> None:
    def callbacks() -> list[TrainerCallback]:
        return [
            PruneCallback(criterion="movement", targets=("*.self_attn.*",)),
            PruneCallback(criterion="movement", targets=("*.up_proj",), end=0.4),
            PruneCallback(criterion="activation", targets=("*.down_proj",), pattern="2:4"),
        ]

    options = {"max_steps": 8, "save_steps": 4}
    whole = trainer_for(small_llama(), tmp_path / "whole", callbacks(), **options)
    whole.train()
    trainer_for(small_llama(), tmp_path, [*callbacks(), StopAt(4)], save_strategy="steps", **options).train()
    resumed = trainer_for(small_llama(seed=1), tmp_path, callbacks(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert same_tensors(state_of(resumed), state_of(whole))
    assert count_zeros(zeros_of(matrices(whole.model))) > 1000


@pytest.mark.parametrize("other", [{}, {"targets": ("*.up_proj",)}, {"targets": ("Linear",)}])
def test_overlapping_targets_are_refused(other: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_for(small_llama(), tmp_path, [PruneCallback(targets=("*.mlp.*",)), PruneCallback(**other)])
    with pytest.raises(HFCompressError, match=r"Two PruneCallbacks target '.*up_proj\.weight'.*its own targets"):
        trainer.train()
    assert trainer.state.global_step == 0


# Module types


def test_types_choose_and_exclude_modules() -> None:
    bert = tiny_bert()
    linear = {f"{name}.weight" for name, module in bert.named_modules() if isinstance(module, nn.Linear)}
    embeddings = {f"{name}.weight" for name, module in bert.named_modules() if isinstance(module, nn.Embedding)}
    assert set(prunable_weights(bert, ("Linear",))) == linear > {"classifier.weight"}
    assert set(prunable_weights(bert, ("Embedding",))) == embeddings
    assert len(embeddings) == 3
    assert set(prunable_weights(bert, ("Linear", "Embedding"), ("classifier",))) == (linear | embeddings) - {
        "classifier.weight"
    }
    assert set(prunable_weights(bert, ("*",), ("Linear",))) == embeddings
    gpt2 = small_gpt2()
    assert set(prunable_weights(gpt2, ("Conv1D",))) == set(prunable_weights(gpt2))
    with pytest.raises(ModelError, match=r"targets=\['Conv2d'\].*types like: Linear, Embedding"):
        prunable_weights(gpt2, ("Conv2d",))


def test_tied_weight_is_an_embedding_and_a_head_at_once() -> None:
    tied, apart = small_llama(), small_llama(tie_word_embeddings=False)
    name = "model.embed_tokens.weight"
    assert "lm_head.weight" in prunable_weights(apart, ("Linear",))
    assert not {name, "lm_head.weight"} & set(prunable_weights(tied, ("Linear",)))
    assert next(iter(prunable_weights(tied, ("Linear", "Embedding")))) == name
    assert list(prunable_weights(tied, ("lm_head",))) == ["lm_head.weight"]
    with pytest.raises(ModelError, match="No weight matches"):
        prunable_weights(tied, ("*embed_tokens",), ("lm_head",))
    assert list(prunable_weights(apart, ("*embed_tokens",), ("lm_head",))) == [name]


@pytest.mark.parametrize("door", ["callback", "oneshot"])
def test_experts_that_are_left_out_are_counted_in_a_warning(
    door: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = MixtralConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0, eos_token_id=5,
    )  # fmt: skip
    for targets in (("*.self_attn.*",), None):
        model = AutoModelForCausalLM.from_config(config)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hfcompress"):
            if door == "callback":
                trainer_for(model, tmp_path, [PruneCallback(0.8, targets=targets)], max_steps=1).train()
            else:
                prune(model, Magnitude(0.8), targets=targets)
        found = [record.message for record in caplog.records if "experts of 2 layers" in record.message]
        assert len(found) == (targets is None)
    assert f"leaves out {2 * 4 * 3 * 32 * 48:,} of the model's {model.num_parameters():,} weights" in found[0]
    assert "hfcompress.quantize" in found[0]


def test_embeddings_are_pruned_when_asked_for(tmp_path: Path) -> None:
    model = tiny_bert()
    trainer_for(model, tmp_path, [PruneCallback(targets=("Embedding",))]).train()
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    total = sum(table.numel() for table in tables)
    assert sum(int((table == 0).sum()) for table in tables) == total // 2
    assert count_zeros(zeros_of(matrices(model))) == 0
