"""Criteria: what they score, what they observe, and that a run can be cut and go on bit for bit."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, BartConfig, PreTrainedModel, Trainer, TrainerCallback

from hfcompress.errors import CheckpointError, HFCompressError, ModelError
from hfcompress.pruning import HeadPruneCallback, NeuronPruneCallback, PruneCallback
from hfcompress.pruning.criteria import CRITERIA, Random, Taylor
from hfcompress.pruning.evidence import KEY
from hfcompress.pruning.inputs import InputSums, sum_of_squares
from hfcompress.pruning.masks import prunable_weights, sparsity_by_layer
from hfcompress.pruning.units.criteria import UnitTaylor
from hfcompress.structure import find_ffn
from tests.conftest import VOCABULARY_SIZE, tiny_bert
from tests.distributed import WORLD_SIZE, run_in_two_processes
from tests.families import FAMILIES
from tests.forks import Forks
from tests.pruning_runs import (
    Rows,
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
    text_rows,
    trainer_for,
    zeros_of,
)

pytestmark = pytest.mark.usefixtures("quick_trainers")
OBSERVING = [name for name, kind in CRITERIA.items() if kind.needs_gradient or kind.needs_activations]
GRADIENT = [name for name, kind in CRITERIA.items() if kind.needs_gradient]


def _padded_rows() -> Rows:
    """Rows whose padding is long, and whose padding token differs from all others."""
    rows = class_rows(8)
    for index, row in enumerate(rows):
        padding = index % 5
        row["attention_mask"] = torch.tensor([1] * (8 - padding) + [0] * padding)
        row["input_ids"] = row["input_ids"].where(row["attention_mask"] != 0, 0)
    return rows


def _batch(rows: Rows) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    twin = tiny_bert() if "Bert" in type(model).__name__ else small_llama()
    twin.load_state_dict(model.state_dict())
    return twin.train()


def _gradients(model: PreTrainedModel, rows: Rows, max_norm: float) -> dict[str, Tensor]:
    """Return the clipped gradients of live weights over all rows at once."""
    twin = _twin(model)
    twin(**_batch(rows)).loss.backward()
    for name, weight in twin.named_parameters():
        if name in matrices(twin):
            weight.grad.mul_(weight != 0)
    nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
    return {name: weight.grad for name, weight in twin.named_parameters() if name in matrices(twin)}


def _input_norms(model: PreTrainedModel, rows: Rows) -> dict[str, Tensor]:
    """Return the root mean square of each linear layer's inputs over the real tokens."""
    twin, batch, norms = _twin(model), _batch(rows), {}
    keep = batch["attention_mask"].bool()

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Tensor]) -> None:
            norms[name + ".weight"] = args[0][keep].square().mean(0).sqrt()

        return see

    for name, module in twin.named_modules():
        if name + ".weight" in matrices(twin):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        twin(**batch)
    return norms


def _expected_scores(criterion: str, model: PreTrainedModel, rows: Rows) -> dict[str, Tensor]:
    weights = {name: weight.clone() for name, weight in matrices(model).items()}
    if criterion == "activation":
        norms = _input_norms(model, rows)
        return {name: weight.abs() * norms[name] for name, weight in weights.items()}
    if criterion == "magnitude":
        return {name: weight.abs() for name, weight in weights.items()}
    if criterion == "random":
        return {name: Random(42).scores(name, weight, {}) for name, weight in weights.items()}
    products = {name: -weights[name] * one for name, one in _gradients(model, rows, 1.0).items()}
    return products if criterion == "movement" else {name: one.abs() for name, one in products.items()}


def _differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> int:
    assert one.keys() == other.keys()
    return sum(int((one[name] ^ other[name]).sum()) for name in one)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_lowest_scores_by_definition_are_pruned(criterion: str, scope: str, tmp_path: Path) -> None:
    model, rows = tiny_bert(), _padded_rows()
    scores = _expected_scores(criterion, model, rows)
    callback = PruneCallback(criterion=criterion, scope=scope, schedule="oneshot")
    trainer_for(
        model, tmp_path, [callback], rows=rows, max_steps=2, learning_rate=0.0, per_device_train_batch_size=8
    ).train()
    everything = torch.cat([one.flatten() for one in scores.values()])
    expected = {}
    for name, one in scores.items():
        compared = everything if scope == "global" else one.flatten()
        expected[name] = one <= compared.sort().values[compared.numel() // 2 - 1]
    assert count_zeros(expected) == half_of(model)
    assert _differences(zeros_of(matrices(model)), expected) <= 2  # sums in another order
    by_size = {name: weight.abs() for name, weight in matrices(tiny_bert()).items()}
    threshold = torch.cat([one.flatten() for one in by_size.values()]).median()
    if criterion != "magnitude":
        assert _differences({name: one <= threshold for name, one in by_size.items()}, expected) > 100


@pytest.mark.parametrize("max_norm", [0.0, 0.05])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("criterion", GRADIENT)
def test_gradients_are_those_of_the_whole_batch(criterion: str, steps: int, max_norm: float, tmp_path: Path) -> None:
    model, rows = small_llama(), text_rows(8)
    expected = {name: torch.zeros_like(weight) for name, weight in matrices(model).items()}
    seen: dict[str, Tensor] = {}

    class Manual(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            weights = {name: weight.clone() for name, weight in matrices(model).items()}
            for name, gradient in _gradients(model, rows, max_norm or float("inf")).items():
                if criterion == "movement":
                    expected[name] -= weights[name] * gradient
                else:
                    expected[name] = 0.9 * expected[name] + 0.1 * (weights[name] * gradient).abs()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (kept,) = kwargs["optimizer"].param_groups[0][KEY].values()
            assert {kept["step"], *kept["observed"].values()} == {state.global_step}
            seen.update({name: next(iter(one.values())).clone() for name, one in kept["states"].items()})

    callback = PruneCallback(sparsity=0.6, criterion=criterion, end=1.0)
    trainer = trainer_for(
        model, tmp_path, [callback, Manual()], rows=rows, max_steps=5, optim="sgd", learning_rate=0.3,
        per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps, max_grad_norm=max_norm,
    )  # fmt: skip
    trainer.train()
    assert seen.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(seen[name], one, rtol=1e-3, atol=1e-7)
    assert KEY not in trainer.optimizer.param_groups[0] or not trainer.optimizer.param_groups[0][KEY]


def test_random_depends_on_name_and_seed_alone() -> None:
    weight = torch.zeros(20, 30)
    first = Random(1).scores("a", weight, {})
    torch.manual_seed(5)
    assert torch.equal(first, Random(1).scores("a", torch.ones(20, 30), {}))
    assert not torch.equal(first, Random(2).scores("a", weight, {}))
    assert not torch.equal(first, Random(1).scores("b", weight, {}))
    assert 0 <= float(first.min()) < 0.02 < 0.98 < float(first.max()) < 1


def test_seed_of_random_is_that_of_the_training_arguments(tmp_path: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        model = tiny_bert()
        trainer_for(model, tmp_path, [PruneCallback(criterion="random")], seed=seed).train()
        found.append(zeros_of(matrices(model)))
    assert same_tensors(found[0], found[1])
    assert not same_tensors(found[0], found[2])


@pytest.mark.parametrize("shape", [(2, 3), (6,)])
def test_padding_is_no_input(shape: tuple[int, ...]) -> None:
    inputs = torch.randn(*shape, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    rows = inputs.view(6, 5)[mask.flatten().bool()]
    expected = torch.cat([rows.square().sum(0), torch.tensor([3.0])])
    torch.testing.assert_close(sum_of_squares(inputs, mask), expected)
    broken = inputs.clone()
    broken.view(6, 5)[2] = float("nan")
    torch.testing.assert_close(sum_of_squares(broken, mask), expected)
    for other in (None, torch.ones(3, 2), torch.ones(2, 1, 3, 3)):
        assert sum_of_squares(inputs, other)[-1] == 6


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_padding_of_the_encoder_is_no_input_of_cross_attention(family: str) -> None:
    model = FAMILIES[family].model().train()
    linears = {f"{name}.weight": one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    watch = InputSums(model, {n: one.weight for n, one in linears.items()}, lambda n, *seen: sum_of_squares(*seen[:2]))
    watch.active = True
    ids = torch.arange(6, 6 + 2 * 5).view(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :4])
    counts = {name: int(one[-1]) for name, one in watch.take().items()}
    watch.remove()
    cross = {name for name in counts if "encoder_attn.k" in name or "encoder_attn.v" in name}
    cross |= {name for name in counts if "EncDecAttention.k" in name or "EncDecAttention.v" in name}
    assert len(cross) >= 2
    assert {counts[name] for name in cross} == {7}
    assert {count for name, count in counts.items() if ".encoder." in f".{name}"} == {7}
    assert {count for name, count in counts.items() if ".decoder." in f".{name}" and name not in cross} == {8}


# Layers that do not run in every step


def _bart(**changes: float) -> PreTrainedModel:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY_SIZE, d_model=32, encoder_layers=4, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, dropout=0.0,
        pad_token_id=0, eos_token_id=5, decoder_start_token_id=5, forced_eos_token_id=None, **changes,
    )  # fmt: skip
    return AutoModelForSeq2SeqLM.from_config(config)


class _Drops(TrainerCallback):
    """Have the second layer not run in some steps, as LayerDrop does, and keep each layer's zeros after every step."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.after = steps, {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layer = kwargs["model"].bert.encoder.layer[1]
        if state.global_step + 1 in self.steps:
            layer.forward = lambda hidden, *args, **kwargs: hidden

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].bert.encoder.layer[1].__dict__.pop("forward", None)
        zeros = zeros_of(matrices(kwargs["model"]))
        self.after[state.global_step] = [
            share_of({name: one for name, one in zeros.items() if f".layer.{index}." in name}) for index in (0, 1)
        ]


OBSERVING_KINDS: list[tuple[Any, str, dict[str, Any]]] = [
    *[(PruneCallback, criterion, {}) for criterion in OBSERVING],
    *[(PruneCallback, "taylor", {"pattern": pattern}) for pattern in ("2:4", "4x1")],
    (HeadPruneCallback, "taylor", {}),
    (HeadPruneCallback, "activation", {}),
    (NeuronPruneCallback, "mutual_information", {}),
]


@pytest.mark.parametrize(("kind", "criterion", "options"), OBSERVING_KINDS)
def test_layer_that_has_not_run_yet_is_not_pruned_before_it_has(
    kind: Any, criterion: str, options: dict[str, Any], tmp_path: Path
) -> None:
    drops = _Drops({1, 2, 4})
    callback = kind(0.5, criterion=criterion, schedule="linear", start=0.0, end=0.7, **options)
    trainer_for(tiny_bert(), tmp_path, [callback, drops], max_steps=6, learning_rate=1e-4).train()
    assert [drops.after[step][1] for step in (1, 2)] == [0.0, 0.0]
    # Zeros of units are zeros of the output projections alone.
    assert drops.after[2][0] > 0.05
    assert 0 < drops.after[6][1] < 0.75


@pytest.mark.parametrize("criterion", ["taylor", "movement", "activation"])
def test_layer_scope_makes_up_for_a_layer_that_ran_late(criterion: str, tmp_path: Path) -> None:
    model, drops = tiny_bert(), _Drops({1, 2, 3, 4})
    callback = PruneCallback(criterion=criterion, scope="layer", schedule="oneshot")
    trainer_for(model, tmp_path, [callback, drops], max_steps=7).train()
    assert drops.after[4] == [0.5, 0.0]
    assert drops.after[5] == drops.after[7] == [0.5, 0.5]


def test_fewer_observations_are_no_lower_scores() -> None:
    weight, gradient = torch.ones(4, 2, 3), torch.rand(4, 2, 3)
    for one in (Taylor(), UnitTaylor()):
        often, seldom = one.initial(weight), one.initial(weight)
        for _ in range(5):
            one.observe_(often, weight, gradient)
        one.observe_(seldom, weight, gradient)
        torch.testing.assert_close(one.scores("w", weight, seldom), one.scores("w", weight, often))


def test_layerdrop_empties_no_layer(tmp_path: Path) -> None:
    model = _bart(encoder_layerdrop=0.5)
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in text_rows()]
    callback = PruneCallback(criterion="taylor")
    trainer_for(model, tmp_path, [callback], rows=rows, max_steps=12, learning_rate=1e-4).train()
    assert callback.reached(model) == pytest.approx(0.5, abs=0.001)
    assert max(sparsity_by_layer(model, prunable_weights(model)).values()) < 0.75


def test_layer_that_never_runs_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callbacks = [PruneCallback(criterion="taylor", scope="layer"), _Drops(set(range(1, 11)))]
    with caplog.at_level(logging.WARNING, logger="hfcompress"):
        trainer_for(tiny_bert(), tmp_path, callbacks).train()
    (message,) = [record.message for record in caplog.records if "ended at step 10" in record.message]
    assert "Nothing was observed of 'bert.encoder.layer.1.attention.self.query.weight'" in message


def test_one_layer_that_is_dropped_alone_is_no_error(tmp_path: Path) -> None:
    model, drops = tiny_bert(), _Drops({1, 3})
    callback = PruneCallback(criterion="taylor", targets=("*.layer.1.*",))
    trainer_for(model, tmp_path, [callback, drops], max_steps=6).train()
    assert [drops.after[1], drops.after[6]] == [[0.0, 0.0], [0.0, 0.5]]


def test_evaluation_is_no_evidence(tmp_path: Path) -> None:
    found = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        model = tiny_bert()
        callback = PruneCallback(criterion="activation", frequency=2)
        trainer_for(model, tmp_path, [callback], rows=_padded_rows(), **options).train()
        found.append(matrices(model))
    assert same_tensors(*found)


# Resuming


@pytest.mark.parametrize("end", [0.3, 0.9])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(criterion: str, end: float, tmp_path: Path) -> None:
    options = {"max_steps": 12, "save_steps": 6, "gradient_accumulation_steps": 2}

    def callback() -> PruneCallback:
        return PruneCallback(sparsity=0.7, end=end, criterion=criterion, frequency=2)

    whole = trainer_for(tiny_bert(), tmp_path / "whole", [callback()], **options)
    whole.train()
    stopped = trainer_for(tiny_bert(), tmp_path / "old", [callback(), StopAt(6)], save_strategy="steps", **options)
    stopped.train()
    # The checkpoint is moved, and the run goes on elsewhere.
    shutil.move(tmp_path / "old" / "checkpoint-6", tmp_path / "moved")
    resumed = trainer_for(tiny_bert(seed=1), tmp_path / "new", [callback()], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "moved"))
    assert resumed.state.global_step == 12
    assert not same_tensors(state_of(stopped), state_of(whole))
    assert same_tensors(state_of(resumed), state_of(whole))


@pytest.mark.parametrize("pattern", ["2:4", "4x1", "row"])
@pytest.mark.parametrize("criterion", ["taylor", "activation"])
def test_conv1d_with_a_pattern_resumes_bit_for_bit(criterion: str, pattern: str, tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_steps": 3}

    def callback() -> PruneCallback:
        return PruneCallback(criterion=criterion, pattern=pattern)

    whole = trainer_for(small_gpt2(), tmp_path / "whole", [callback()], **options)
    trainer_for(small_gpt2(), tmp_path, [callback(), StopAt(3)], save_strategy="steps", **options).train()
    resumed = trainer_for(small_gpt2(), tmp_path, [callback()], **options)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_tensors(state_of(resumed), state_of(whole))


@pytest.mark.parametrize("step", [5, 9])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_checkpoint_written_without_the_callback_resumes(criterion: str, step: int, tmp_path: Path) -> None:
    # Step 9 lies behind the end of the ramp: what was missed is made up for at once.
    trainer_for(tiny_bert(), tmp_path, [StopAt(step)], save_strategy="steps", save_steps=step).train()
    model, watch = tiny_bert(), Watch()
    trainer_for(model, tmp_path, [PruneCallback(criterion=criterion), watch]).train(resume_from_checkpoint=True)
    assert min(watch.after) == step + 1
    assert count_zeros(watch.after[step + 1]) > 0
    assert count_zeros(watch.after[10]) == half_of(model)


@pytest.mark.parametrize("schedule", ["cubic", "constant"])
def test_best_model_of_a_run_that_was_dense_too_long_does_not_count(schedule: str, tmp_path: Path) -> None:
    scores = iter([9.0, 8.0, 7.0, 1.0, 2.0])
    options: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True,
        "compute_metrics": lambda prediction: {"score": next(scores)}, "max_steps": 10,
    }  # fmt: skip
    trainer_for(tiny_bert(), tmp_path, [StopAt(6)], **options).train()
    model = tiny_bert()
    trainer = trainer_for(model, tmp_path, [PruneCallback(schedule=schedule, end=0.3)], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert trainer.state.best_global_step == 10
    assert count_zeros(zeros_of(matrices(model))) == half_of(model)


def _stopped_run(criterion: str, folder: Path) -> Path:
    callbacks = [PruneCallback(criterion=criterion), StopAt(4)]
    trainer_for(tiny_bert(), folder, callbacks, save_strategy="steps", save_steps=2).train()
    return folder / "checkpoint-4"


@pytest.mark.parametrize("criterion", CRITERIA)
def test_checkpoint_without_its_scores_is_noticed(criterion: str, tmp_path: Path) -> None:
    checkpoint = _stopped_run(criterion, tmp_path)
    (checkpoint / "optimizer.pt").unlink()
    model = tiny_bert()
    trainer = trainer_for(model, tmp_path, [PruneCallback(criterion=criterion)])
    if criterion not in OBSERVING:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert count_zeros(zeros_of(matrices(model))) == half_of(model)
        return
    with pytest.raises(CheckpointError, match=rf"step 4 lacks the scores \({criterion} of .*Resume from another"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(("steps", "others"), [(4, 2), (2, 4)])
def test_scores_of_another_step_are_noticed(steps: int, others: int, tmp_path: Path) -> None:
    _stopped_run("movement", tmp_path)
    shutil.copy(tmp_path / f"checkpoint-{others}" / "optimizer.pt", tmp_path / f"checkpoint-{steps}")
    trainer = trainer_for(tiny_bert(), tmp_path, [PruneCallback(criterion="movement")])
    message = rf"scores \(movement of .*\) of step {others}, but training goes on from step {steps}"
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))


def test_new_criterion_on_an_old_checkpoint_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = _stopped_run("movement", tmp_path)
    model = tiny_bert()
    with caplog.at_level(logging.WARNING, logger="hfcompress"):
        trainer_for(model, tmp_path, [PruneCallback(criterion="taylor")]).train(resume_from_checkpoint=str(checkpoint))
    assert any("holds no scores (taylor of" in record.message for record in caplog.records)
    assert count_zeros(zeros_of(matrices(model))) == half_of(model)


@pytest.mark.parametrize("kind", [PruneCallback, NeuronPruneCallback])
def test_training_that_starts_over_with_smaller_batches_begins_anew(kind: Any, tmp_path: Path) -> None:
    class RunsOutOfMemory(TrainerCallback):
        steps: list[int] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps = [*self.steps, state.global_step]
            if len(self.steps) == 3:
                raise RuntimeError("CUDA out of memory.")

    full, callback = RunsOutOfMemory(), kind(0.5, criterion="taylor")
    options: dict[str, Any] = {"auto_find_batch_size": True, "max_steps": 4}
    trainer = trainer_for(tiny_bert(), tmp_path, [callback, full], **options)
    trainer.train()
    assert full.steps == [0, 1, 2, 0, 1, 2, 3]
    assert callback.reached(trainer.model) == pytest.approx(0.5, abs=0.001)


def test_training_goes_on_without_the_callback_and_then_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def trained(steps: int, *callbacks: TrainerCallback) -> PreTrainedModel:
        model = tiny_bert()
        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
        trainer = trainer_for(model, tmp_path, [*callbacks, StopAt(steps)], **options)
        trainer.train(resume_from_checkpoint=steps > 2)
        return model

    trained(2, PruneCallback(criterion="taylor"))
    trained(4)
    with caplog.at_level(logging.WARNING, logger="hfcompress"):
        model = trained(6, PruneCallback(criterion="taylor"))
    (message,) = [record.message for record in caplog.records if "holds no scores" in record.message]
    assert "later than of step 2; they begin at step 4" in message
    assert count_zeros(zeros_of(matrices(model))) == half_of(model)


def test_scores_of_other_weights_are_refused_by_name(tmp_path: Path) -> None:
    query, key = "*.layer.0.attention.self.query", "*.layer.0.attention.self.key"
    callbacks = [PruneCallback(criterion="taylor", targets=(query, "*.layer.1.output.dense")), StopAt(2)]
    trainer_for(tiny_bert(), tmp_path, callbacks, save_strategy="steps", save_steps=2).train()
    more = PruneCallback(criterion="taylor", targets=(query, key))
    with pytest.raises(
        CheckpointError,
        match=r"other weights.*not of '.*\.0\..*key\.weight', and also of '.*\.1\.output\.dense\.weight'",
    ):
        trainer_for(tiny_bert(), tmp_path, [more]).train(resume_from_checkpoint=True)


def test_a_second_run_of_the_same_trainer_starts_anew(tmp_path: Path) -> None:
    model = tiny_bert()
    trainer = trainer_for(model, tmp_path, [PruneCallback(criterion="movement")])
    trainer.train()
    trainer.train()
    assert count_zeros(zeros_of(matrices(model))) == half_of(model)


def test_checkpoint_state_is_json(tmp_path: Path) -> None:
    checkpoint = _stopped_run("taylor", tmp_path)
    marks = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"][KEY]
    assert marks == {"taylor of bert.encoder.layer.0.attention.self.query.weight": 4}
    trainer = trainer_for(
        tiny_bert(), tmp_path, [PruneCallback(criterion="taylor")], restore_callback_states_from_checkpoint=True
    )
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 10


# The gradient scaler


class _Overflows(TrainerCallback):
    """Make the gradients of some steps infinite, as float16 does, in a weight that nobody prunes.

    forward: whether what a layer sees is infinite already, and all gradients are no numbers.
    """

    def __init__(self, steps: set[int], forward: bool = False) -> None:
        self.steps, self.forward, self.handle, self.before = steps, forward, None, {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self.steps and self.forward:
            layer = kwargs["model"].bert.encoder.layer[0].intermediate
            self.handle = layer.register_forward_hook(lambda module, inputs, output: output * torch.inf)
        elif state.global_step + 1 in self.steps:
            bias = kwargs["model"].classifier.bias
            self.handle = bias.register_hook(lambda gradient: gradient * torch.inf)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = {name: weight.clone() for name, weight in matrices(kwargs["model"]).items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = matrices(kwargs["model"])
        unmoved = all(torch.equal(after[name], before * (after[name] != 0)) for name, before in self.before.items())
        # Fused optimizers skip by themselves, and accelerate does not call that skipped.
        assert unmoved == (state.global_step + 1 in self.steps)
        if self.handle is not None:
            self.handle.remove()
            self.handle = None


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give a Trainer a real gradient scaler on the CPU, which accelerate offers on accelerators alone."""

    def scale(trainer: Trainer) -> Trainer:
        accelerator = trainer.accelerator
        monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=256.0))
        monkeypatch.setattr(accelerator, "native_amp", True)
        monkeypatch.setitem(accelerator.state._shared_state, "_mixed_precision", "fp16")
        monkeypatch.setattr(accelerator, "prepare_model", lambda model, **options: model)
        return trainer

    return scale


@pytest.mark.parametrize(("optim", "max_norm"), [("adamw_torch_fused", 0.0), ("adamw_torch", 1.0)])
@pytest.mark.parametrize("skipped", [{3}, {1, 2}, {1, 2, 5, 7}])
@pytest.mark.parametrize("criterion", ["magnitude", *OBSERVING])
def test_skipped_steps_move_neither_schedule_nor_scores(
    criterion: str, skipped: set[int], optim: str, max_norm: float, scaled: Any, tmp_path: Path
) -> None:
    model, rows, watch = tiny_bert(), class_rows(8), Watch()
    observed = {}

    class Scores(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for kept in kwargs["optimizer"].param_groups[0].get(KEY, {}).values():
                (observed[state.global_step],) = set(kept["observed"].values())
                assert all(bool(one.isfinite().all()) for s in kept["states"].values() for one in s.values())

    callback = PruneCallback(criterion=criterion, schedule="linear", end=0.8)
    trainer = scaled(
        trainer_for(
            model, tmp_path, [callback, watch, Scores()], rows=rows, max_steps=10, max_grad_norm=max_norm,
            per_device_train_batch_size=8,
        )
    )  # fmt: skip
    trainer.add_callback(_Overflows(skipped, forward=criterion == "activation"))
    trainer.train()
    total = 2 * half_of(model)
    for step, zeros in watch.after.items():
        wanted = int(0.5 * min(step, 8) / 8 * total + 1e-6)
        waits = criterion in OBSERVING and set(range(1, step + 1)) <= skipped  # nothing is known yet
        assert count_zeros(zeros) == (0 if waits else wanted), step
        if criterion in OBSERVING:
            assert observed[step] == len(set(range(1, min(step, 8) + 1)) - skipped)


@pytest.mark.parametrize("criterion", ["taylor", "activation"])
def test_skipped_steps_move_no_neurons(criterion: str, scaled: Any, tmp_path: Path) -> None:
    model, skipped, closed = tiny_bert(), {1, 2, 5}, {}
    total = sum(block.width for block in find_ffn(model))
    callback = NeuronPruneCallback(0.5, criterion=criterion, schedule="linear", start=0.0, end=0.8)

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            closed[state.global_step] = round(callback.reached(model) * total)

    options: dict[str, Any] = {"rows": class_rows(8), "max_grad_norm": 0.0, "per_device_train_batch_size": 8}
    trainer = scaled(trainer_for(model, tmp_path, [callback, Count()], **options))
    trainer.add_callback(_Overflows(skipped, forward=criterion == "activation"))
    trainer.train()
    assert closed == {step: 0 if step < 3 else int(0.5 * min(step, 8) / 8 * total + 1e-6) for step in range(1, 11)}


# Refusals


@pytest.mark.parametrize("criterion", GRADIENT)
def test_frozen_weights_are_refused_by_gradient_criteria(criterion: str, tmp_path: Path) -> None:
    model = tiny_bert()
    frozen = model.bert.encoder.layer[0].attention.self.query.weight.requires_grad_(False)
    before = frozen.clone()
    trainer = trainer_for(model, tmp_path, [PruneCallback(criterion=criterion)])
    with pytest.raises(
        ModelError, match=r"needs gradients, but 'bert\.encoder\.layer\.0.*query\.weight' have requires"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    assert torch.equal(frozen, before)
    trainer_for(model, tmp_path, [PruneCallback(criterion=criterion, exclude=("*.layer.0.*",))]).train()


def test_activation_is_refused_where_there_are_no_linear_inputs(tmp_path: Path) -> None:
    callback = PruneCallback(criterion="activation", targets=("Embedding",))
    with pytest.raises(ModelError, match=r"'bert\.embeddings\.word_embeddings\.weight' is in none"):
        trainer_for(tiny_bert(), tmp_path, [callback]).train()


def test_optimizer_that_keeps_no_gradients_is_refused(tmp_path: Path) -> None:
    class Drops(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["model"].zero_grad()

    trainer = trainer_for(tiny_bert(), tmp_path, [Drops(), PruneCallback(criterion="taylor")])
    with pytest.raises(HFCompressError, match="No weight has a gradient before the optimizer's step"):
        trainer.train()


@pytest.mark.parametrize("criterion", OBSERVING)
def test_constant_schedule_is_refused_where_scores_must_be_observed(criterion: str) -> None:
    with pytest.raises(HFCompressError, match=f"criterion='{criterion}' has seen nothing; use schedule='oneshot'"):
        PruneCallback(criterion=criterion, schedule="constant")


# Two processes


def _callbacks() -> list[TrainerCallback]:
    kinds = {"movement": "*.self_attn.*", "taylor": "*.up_proj", "activation": "*.down_proj", "random": "*.gate_proj"}
    return [PruneCallback(criterion=name, targets=(pattern,), frequency=3) for name, pattern in kinds.items()]


def _prune_in_one_process(folder: str) -> None:
    model = small_llama()
    trainer_for(
        model, Path(folder), _callbacks(), rows=text_rows(8), per_device_train_batch_size=2, ddp_backend="gloo",
        gradient_accumulation_steps=2,
    ).train()  # fmt: skip
    torch.save(matrices(model), Path(folder) / f"{torch.distributed.get_rank()}.pt")


@pytest.mark.distributed
def test_two_processes_observe_the_same(tmp_path: Path, forks: Forks) -> None:
    run_in_two_processes(forks, _prune_in_one_process, str(tmp_path))
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD_SIZE))
    assert same_tensors(one, other)
    # the same rows in one process
    model = small_llama()
    trainer_for(model, tmp_path, _callbacks(), rows=text_rows(8), per_device_train_batch_size=8).train()
    assert count_zeros(zeros_of(one)) == count_zeros(zeros_of(matrices(model))) > 1000
    assert _differences(zeros_of(one), zeros_of(matrices(model))) < 20  # sums in another order
