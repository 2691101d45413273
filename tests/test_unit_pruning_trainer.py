"""Head and neuron pruning beside what else a Trainer does: resuming, accumulation, other callbacks, refusals."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import DistributedType, PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    GptOssConfig,
    MambaConfig,
    Olmo2Config,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    TrainerCallback,
)

from hfcompress.distillation import DistillationConfig, DistillationTrainer
from hfcompress.errors import HFCompressError
from hfcompress.pruning import (
    HeadPruneCallback,
    HeadPruneOptions,
    NeuronPruneCallback,
    NeuronPruneOptions,
    PruneCallback,
)
from hfcompress.pruning.evidence import KEY
from hfcompress.pruning.units.trial import one_of_each_kind
from hfcompress.quantization import QuantizeAwareCallback
from hfcompress.structure import attach_gates, find_attention, find_ffn, shrink, zero_neurons_
from tests.conftest import tiny_bert
from tests.distributed import WORLD_SIZE, run_in_two_processes
from tests.families import FAMILIES
from tests.forks import Forks
from tests.pruning_runs import (
    StopAt,
    Watch,
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
from tests.test_unit_pruning import WatchUnits, count, small_t5, total

pytestmark = pytest.mark.usefixtures("quick_trainers")
KINDS = [HeadPruneCallback, NeuronPruneCallback]
MODELS = {"bert": tiny_bert, "llama": small_llama, "gpt2": small_gpt2, "t5": small_t5}


# Resuming


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("criterion", ["taylor", "activation", "magnitude", "random"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_resumed_run_is_bit_for_bit_the_whole_one(name: str, criterion: str, beside: bool, tmp_path: Path) -> None:
    def callbacks() -> list[TrainerCallback]:
        pruning = [PruneCallback(0.7, criterion="taylor", pattern="4x1")] if beside else []
        return [HeadPruneCallback(0.5, criterion=criterion), NeuronPruneCallback(0.6, criterion=criterion), *pruning]

    options = {"max_steps": 8, "save_steps": 3}
    whole = trainer_for(MODELS[name](), tmp_path / "whole", callbacks(), save_strategy="steps", **options)
    whole.train()
    trainer_for(MODELS[name](), tmp_path, [*callbacks(), StopAt(3)], save_strategy="steps", **options).train()
    model = MODELS[name](seed=1) if name != "gpt2" else small_gpt2()
    watch = WatchUnits(model)
    resumed = trainer_for(model, tmp_path, [*callbacks(), watch], save_strategy="steps", **options)
    resumed.train(resume_from_checkpoint=True)
    assert min(watch.after) == 4
    assert 0 < count(watch.after[4][1]) < count(watch.after[8][1])
    assert same_tensors(state_of(resumed), state_of(whole))


def test_checkpoint_of_the_middle_is_a_plain_model_with_closed_units(tmp_path: Path) -> None:
    model = small_llama()
    watch = WatchUnits(model)
    trainer_for(
        model, tmp_path, [HeadPruneCallback(0.5), NeuronPruneCallback(0.5), watch], save_strategy="steps", save_steps=4
    ).train()
    reloaded = type(model).from_pretrained(tmp_path / "checkpoint-4")
    assert reloaded.num_parameters() == model.num_parameters()
    assert all(same_tensors(one, two) for one, two in zip(watch.closed(reloaded), watch.after[4]))
    assert 0 < count(watch.after[4][1]) < count(watch.after[10][1])


# What training sees


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_taylor_scores_are_gate_gradients_of_the_whole_batch(kind: Any, steps: int, tmp_path: Path) -> None:
    model, rows = small_llama(), text_rows(8)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    expected: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    class Manual(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            twin = small_llama()
            twin.load_state_dict(model.state_dict())
            attention = find_attention(twin) if kind is HeadPruneCallback else []
            ffn = find_ffn(twin) if kind is NeuronPruneCallback else []
            gates = attach_gates(twin, attention, ffn)
            twin.train()(**batch).loss.backward()
            for gate in (gates.heads | gates.neurons).values():
                name = next(n for n, m in twin.named_modules() if m is gate.module) + ".weight"
                expected[name] = 0.98 * expected.get(name, torch.zeros(())) + 0.02 * gate.values.grad.abs()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (kept,) = kwargs["optimizer"].param_groups[0][KEY].values()
            assert {kept["step"], *kept["observed"].values()} == {state.global_step}
            seen.update({name: one["average"].clone() for name, one in kept["states"].items()})

    trainer = trainer_for(
        model, tmp_path, [kind(0.5, end=1.0), Manual()], rows=rows, max_steps=4, optim="sgd", learning_rate=0.3,
        per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps, max_grad_norm=0.0,
    )  # fmt: skip
    trainer.train()
    assert seen.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(seen[name], one, rtol=1e-3, atol=1e-7)
    assert not trainer.optimizer.param_groups[0].get(KEY)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_finding_heads_changes_nothing_of_the_training(name: str, tmp_path: Path) -> None:
    def losses(callbacks: list[TrainerCallback]) -> list[float]:
        model = tiny_bert(hidden_dropout_prob=0.2) if name == "bert" else small_t5()
        trainer = trainer_for(model, tmp_path, callbacks, max_steps=4)
        trainer.train()
        assert model.training
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain = losses([])
    assert losses([HeadPruneCallback(0.0), NeuronPruneCallback(0.0)]) == plain
    assert losses([HeadPruneCallback(0.5), NeuronPruneCallback(0.5)]) != plain


@pytest.mark.parametrize("options", [{"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}])
def test_autocast_and_compiled_models_are_pruned(options: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for more in ({}, options):
        torch.compiler.reset()
        model = tiny_bert(layers=1)
        watch = WatchUnits(model)
        callbacks = [HeadPruneCallback(0.5), NeuronPruneCallback(0.5, criterion="activation"), watch]
        trainer_for(model, tmp_path, callbacks, max_steps=5, learning_rate=0.0, **more).train()
        found.append([next(iter(closed.values())) for closed in watch.closed(model)])
    torch.compiler.reset()
    assert [[int(one.sum()) for one in run] for run in found] == [[2, 32], [2, 32]]
    # What goes where nothing was seen, since all scores are zero: the first ones.
    assert not any(bool(one[: len(one) // 2].all()) for run in found for one in run)
    (heads, neurons), (other_heads, other_neurons) = found
    assert torch.equal(heads, other_heads)
    # bfloat16 decides otherwise between neurons that are nearly as quiet.
    assert int((neurons & other_neurons).sum()) >= (30 if "bf16" in options else 32)


def test_distilled_student_loses_heads_and_the_teacher_does_not(tmp_path: Path) -> None:
    student, teacher = small_llama(), small_llama(seed=1)
    watch = WatchUnits(student)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    arguments = DistillationConfig(
        tmp_path, max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    DistillationTrainer(
        model=student, teacher_model=teacher, args=arguments, train_dataset=text_rows(),
        callbacks=[HeadPruneCallback(0.5), NeuronPruneCallback(0.5), watch],
    ).train()  # fmt: skip
    heads, neurons = watch.after[6]
    assert (count(heads), count(neurons)) == (total(heads) // 2, total(neurons) // 2)
    assert same_tensors(before, teacher.state_dict())


# The best model and the reports


def test_best_model_has_all_closed(tmp_path: Path) -> None:
    calls: list[int] = []

    def score(prediction: Any) -> dict[str, float]:
        calls.append(0)
        return {"score": -len(calls)}

    model = small_llama()
    watch = WatchUnits(model)
    trainer = trainer_for(
        model, tmp_path, [HeadPruneCallback(0.5, end=0.6)], eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        compute_metrics=score,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 6
    assert count(watch.closed(model)[0]) == 4


def test_every_evaluation_logs_shares_under_names_of_their_own(tmp_path: Path) -> None:
    model = small_t5()
    watch = WatchUnits(model)
    callbacks = [HeadPruneCallback(0.5), NeuronPruneCallback(0.25), PruneCallback(0.3), watch]
    trainer = trainer_for(model, tmp_path, callbacks, eval_strategy="steps", eval_steps=4, max_steps=8)
    trainer.train()
    entries = {entry["step"]: entry for entry in trainer.state.log_history if "eval_loss" in entry}
    assert list(entries) == [4, 8]
    for step, entry in entries.items():
        for name, closed in zip(("heads_pruned", "neurons_pruned"), watch.after[step]):
            assert entry[name] == pytest.approx(count(closed) / total(closed))
            layers = {key for key in entry if key.startswith(f"{name}/")}
            assert layers == {f"{name}/{stack}.block.{index}" for stack in ("encoder", "decoder") for index in (0, 1)}
            for layer in layers:
                inside = {n: one for n, one in closed.items() if n.startswith(layer.partition("/")[2] + ".")}
                assert entry[layer] == pytest.approx(count(inside) / total(inside))
        assert entry["sparsity"] > 0
    assert entries[8]["heads_pruned"] != entries[8]["neurons_pruned"]


def test_run_that_ends_too_early_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hfcompress"):
        for scope in ("global", "layer"):
            callbacks = [HeadPruneCallback(0.6, scope=scope), NeuronPruneCallback(0.333, scope=scope)]
            trainer_for(tiny_bert(), tmp_path, callbacks).train()
        assert not [record for record in caplog.records if "PruneCallback" in record.message]
        trainer_for(tiny_bert(), tmp_path, [NeuronPruneCallback(0.5), StopAt(3)]).train()
    (message,) = [record.message for record in caplog.records if "PruneCallback" in record.message]
    assert message.startswith("NeuronPruneCallback: training ended at step 3 with sparsity 0.")


# Beside weight pruning


@pytest.mark.parametrize("first", ["units", "weights"])
@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "random"])
def test_zeros_of_closed_units_count_for_weight_pruning(criterion: str, first: str, tmp_path: Path) -> None:
    model, watch = small_llama(), Watch()
    units = WatchUnits(model)
    pruning: list[TrainerCallback] = [HeadPruneCallback(0.5, end=0.5), NeuronPruneCallback(0.5, end=0.5)]
    weights = PruneCallback(0.5, criterion=criterion, start=0.5, end=0.8)
    callbacks = [*pruning, weights] if first == "units" else [weights, *pruning]
    trainer_for(model, tmp_path, [*callbacks, watch, units]).train()
    assert count_zeros(watch.after[10]) == half_of(model)
    assert 0 < share_of(watch.after[5]) < share_of(watch.after[8]) == share_of(watch.after[10])
    heads, neurons = units.after[10]
    assert count(heads) >= total(heads) // 2
    assert count(neurons) >= total(neurons) // 2
    closed_at_5 = units.after[5]
    for before, after in zip(closed_at_5, units.after[10]):
        assert all(bool(after[name][one].all()) for name, one in before.items())


def test_neurons_that_weight_pruning_silenced_count_as_closed(tmp_path: Path) -> None:
    model = small_llama()
    units = WatchUnits(model)
    silent = PruneCallback(0.99, targets=("*.down_proj",), schedule="oneshot", start=0.0)
    trainer_for(model, tmp_path, [silent, NeuronPruneCallback(0.25, end=1.0), units]).train()
    assert count(units.after[10][1]) > total(units.after[10][1]) // 4
    assert count(units.after[2][1]) == count(units.after[10][1])


def test_two_callbacks_prune_heads_of_their_own_layers(tmp_path: Path) -> None:
    model = tiny_bert()
    watch = WatchUnits(model)
    callbacks = [
        HeadPruneCallback(0.25, exclude=("bert.encoder.layer.1",)),
        HeadPruneCallback(0.75, exclude=("bert.encoder.layer.0",)),
    ]
    trainer = trainer_for(model, tmp_path, [*callbacks, watch], eval_strategy="steps", eval_steps=10)
    trainer.train()
    assert [int(one.sum()) for one in watch.after[10][0].values()] == [1, 3]
    (entry,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert (entry["heads_pruned_1"], entry["heads_pruned_2"]) == (0.25, 0.75)


def test_layer_that_lost_all_its_neurons_is_trained_further(tmp_path: Path) -> None:
    model = tiny_bert(layers=3)
    zero_neurons_(model, find_ffn(model)[1], range(64))
    shrink(model)
    trainer = trainer_for(
        model, tmp_path, [NeuronPruneCallback(0.5)], eval_strategy="steps", eval_steps=4, max_steps=4
    )
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert entry["neurons_pruned"] == 0.5
    assert entry.get("neurons_pruned/bert.encoder.layer.1", 0.0) == 0.0
    assert trainer.evaluate()["eval_loss"] > 0


# Refusals


def _refused(model: PreTrainedModel, callbacks: list[Any], folder: Path, match: str, **flags: Any) -> None:
    trainer = trainer_for(model, folder, callbacks)
    for name, value in flags.items():
        setattr(trainer.args, name, value)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(HFCompressError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0
    assert same_tensors(before, model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"criterion": "movement"}, "'taylor', 'magnitude', 'activation', .*'mutual_information' or 'random'"),
        ({"start": 0.7, "end": 0.7}, r"start=0\.7 must lie before end=0\.7"),
        ({"schedule": "constant"}, "criterion='taylor' has seen nothing"),
        ({"scedule": "linear"}, r"PruneCallback has no option 'scedule'\. Did you mean 'schedule'"),
    ],
)
def test_wrong_options_are_refused(kind: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(HFCompressError, match=match):
        kind(**options)


def test_constant_schedule_closes_before_the_first_step(tmp_path: Path) -> None:
    model = tiny_bert()
    watch = WatchUnits(model)
    callback = HeadPruneCallback(0.5, schedule="constant", criterion="magnitude")
    trainer_for(model, tmp_path, [callback, watch], max_steps=2).train()
    assert [count(heads) for heads, _ in watch.after.values()] == [4, 4]


@pytest.mark.parametrize(
    ("make", "callback", "match"),
    [
        (small_llama, HeadPruneCallback(0.8), r"asks for 6 of 8 heads of the model, but only 4 can go.*at most 0\.5"),
        (small_gpt2, HeadPruneCallback(0.9), r"asks for 7 of 8 heads of the model, but only 6 can go.*at most 0\.75"),
        (small_llama, HeadPruneCallback(0.8, scope="layer"), "asks for 3 of 4 heads of one layer, but only 2 can go"),
        (tiny_bert, HeadPruneCallback(0.1), r"closes nothing: of 8 heads, .* at once is 1\..*at least 0\.125\."),
        (small_llama, HeadPruneCallback(0.2), r"closes nothing: of 8 heads, .* at once is 2\..*at least 0\.25\."),
        (small_llama, HeadPruneCallback(0.3, scope="layer"), r"at least 0\.5, or scope=global"),
        (tiny_bert, NeuronPruneCallback(0.001), "closes nothing: of 128 neurons"),
        (tiny_bert, HeadPruneCallback(0.5, exclude=("*",)), r"exclude=\['\*'\] leaves no heads.*layer\.0\.attention"),
    ],
)
def test_what_cannot_go_is_refused_with_what_can(make: Any, callback: Any, match: str, tmp_path: Path) -> None:
    _refused(make(), [callback], tmp_path, match)


def test_named_least_and_most_are_accepted(tmp_path: Path) -> None:
    for make, sparsity in ((small_llama, 0.5), (small_gpt2, 0.75), (tiny_bert, 0.125), (small_llama, 0.25)):
        model = make()
        watch = WatchUnits(model)
        trainer_for(model, tmp_path, [HeadPruneCallback(sparsity), watch], max_steps=4).train()
        assert count(watch.after[4][0]) == sparsity * 8


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_output_projection_is_refused_by_name(kind: Any, tmp_path: Path) -> None:
    model = small_llama()
    model.model.layers[1].requires_grad_(False)
    name = "self_attn.o_proj" if kind is HeadPruneCallback else "mlp.down_proj"
    for criterion in ("magnitude", "taylor"):
        _refused(model, [kind(criterion=criterion)], tmp_path, rf"model\.layers\.1\.{name}\.weight'.*requires_grad")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flag", ["fsdp", "deepspeed"])
def test_sharded_training_is_refused(kind: Any, flag: str, tmp_path: Path) -> None:
    _refused(small_llama(), [kind()], tmp_path, f"{kind.__name__} needs whole.*FSDP or DeepSpeed", **{flag: True})


def test_sharding_that_the_launcher_chose_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(small_llama(), tmp_path, [])
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(HFCompressError, match="FSDP or DeepSpeed shards"):
        HeadPruneCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


UNFOUND = {
    "olmo2": (
        Olmo2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            eos_token_id=5,
        ),
        HeadPruneCallback,
        r"q_proj cannot be cut by heads: one of its features acts on several of them",
    ),
    "bloom": (
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        HeadPruneCallback,
        "runs no attention through Transformers' attention interface",
    ),
    "mamba": (
        MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, eos_token_id=5),
        NeuronPruneCallback,
        "has no feed-forward block of linear layers",
    ),
}


@pytest.mark.parametrize("name", UNFOUND)
def test_model_whose_units_cannot_be_found_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    config, kind, reason = UNFOUND[name]
    _refused(AutoModelForCausalLM.from_config(config), [kind()], tmp_path, reason)


TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 4, "eos_token_id": 5,
}  # fmt: skip
HEADS_WITH_PARAMETERS = {
    "a sink for each": GptOssConfig(**TINY, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    "a norm for each": CohereConfig(**TINY, use_qk_norm=True),
}


@pytest.mark.parametrize("name", HEADS_WITH_PARAMETERS)
def test_heads_that_shrink_cannot_remove_are_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(HEADS_WITH_PARAMETERS[name])
    reason = "HeadPruneCallback closes only heads that shrink can remove, .*cannot run without its closed heads"
    _refused(model, [HeadPruneCallback(0.5)], tmp_path, reason)


def test_heads_of_an_architecture_that_fixes_them_are_refused(tmp_path: Path) -> None:
    # a table of relative positions has one column per head
    config = SwinConfig(image_size=16, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4)
    trainer = trainer_for(SwinForImageClassification(config), tmp_path, [])
    with pytest.raises(HFCompressError, match="SwinForImageClassification cannot run without its closed heads"):
        HeadPruneCallback(0.5).on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


class _PerNeuron(nn.Module):
    """An activation with a parameter for each neuron."""

    def __init__(self, neurons: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((neurons,), 0.1))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.maximum(hidden, self.slope * hidden)


def test_neurons_that_shrink_cannot_remove_are_refused_with_its_reason(tmp_path: Path) -> None:
    model = tiny_bert()
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = _PerNeuron(64)
    callback = NeuronPruneCallback(0.5, exclude=("bert.encoder.layer.0",))
    reason = "NeuronPruneCallback closes only neurons that shrink can remove, .*cannot run without its closed"
    _refused(model, [callback], tmp_path, reason)


@pytest.mark.parametrize("name", FAMILIES)
def test_trying_a_removal_leaves_the_model_as_it_was(name: str) -> None:
    model = FAMILIES[name].model()
    parameters = {key: (id(one), one.clone()) for key, one in model.named_parameters()}
    config, random = model.config.to_dict(), torch.get_rng_state()
    for kind in KINDS:
        callback = kind(0.5)
        callback._find(model)
        tried = one_of_each_kind(callback._bundles, callback._sites)
        assert 1 <= len(tried) <= len(callback._sites)
        callback._refuse_unremovable(model)
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random)
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(id(after[key]) == own and torch.equal(after[key], value) for key, (own, value) in parameters.items())


@pytest.fixture
def split_weight() -> Iterator[nn.Parameter]:
    """A weight as tensor parallel and FSDP2 hold it, on a mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield nn.Parameter(distribute_tensor(torch.ones(32, 32), mesh, [Shard(0)]))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [*KINDS, PruneCallback, QuantizeAwareCallback])
def test_weights_split_over_devices_are_refused(kind: Any, tmp_path: Path, split_weight: nn.Parameter) -> None:
    trainer = trainer_for(small_llama(), tmp_path, [])
    trainer.model.model.layers[1].self_attn.o_proj.weight = split_weight
    with pytest.raises(HFCompressError, match=rf"{kind.__name__} needs whole weights.*layers\.1\.self_attn\.o_proj"):
        kind().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


@pytest.mark.parametrize("kind", KINDS)
def test_same_heads_in_two_callbacks_are_refused(kind: Any, tmp_path: Path) -> None:
    _refused(small_llama(), [kind(0.25), kind(0.5)], tmp_path, f"Two {kind.__name__}s target")


def test_callbacks_from_options_have_these_options() -> None:
    heads = HeadPruneOptions(sparsity=0.3, grouped="even", exclude=("a",))
    assert HeadPruneCallback.from_options(heads).options == heads
    neurons = NeuronPruneOptions(criterion="activation", normalize=True)
    assert NeuronPruneCallback.from_options(neurons).options == neurons


# Two processes


def _prune_in_one_process(folder: str) -> None:
    model = small_llama()
    callbacks = [HeadPruneCallback(0.5), NeuronPruneCallback(0.5, criterion="activation")]
    trainer = trainer_for(model, Path(folder), callbacks, per_device_train_batch_size=2, ddp_backend="gloo")
    trainer.train()
    torch.save((trainer.args.world_size, matrices(model)), Path(folder) / f"{trainer.args.process_index}.pt")


@pytest.mark.distributed
def test_two_processes_close_the_same_units(tmp_path: Path, forks: Forks) -> None:
    run_in_two_processes(forks, _prune_in_one_process, str(tmp_path))
    (size, weights), (_, other) = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD_SIZE)]
    assert size == WORLD_SIZE
    assert same_tensors(weights, other)
    model = small_llama()
    watch = WatchUnits(model)
    model.load_state_dict(weights, strict=False)
    heads, neurons = watch.closed(model)
    assert (count(heads), count(neurons)) == (total(heads) // 2, total(neurons) // 2)
    # the same rows in one process
    callbacks = [HeadPruneCallback(0.5), NeuronPruneCallback(0.5, criterion="activation")]
    trainer_for(small_llama(), tmp_path, [*callbacks, watch], per_device_train_batch_size=4).train()
    assert same_tensors(heads, watch.after[10][0])
    assert sum(int((neurons[name] ^ one).sum()) for name, one in watch.after[10][1].items()) <= 2
    assert count_zeros(zeros_of(weights)) > 0
