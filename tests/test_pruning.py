"""Gradual pruning: masks that hold, schedules that need no state, and runs that can be cut anywhere."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import DistributedType, PartialState
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    TrainerCallback,
    TrainerState,
)

from hfcompress.errors import HFCompressError, ModelError
from hfcompress.pruning import NeuronPruneCallback, PruneCallback, PruneOptions
from hfcompress.pruning.masks import prunable_weights, sparsity_by_layer
from hfcompress.pruning.optimizers import clear_moments_, keeps_zeros
from hfcompress.pruning.schedules import SCHEDULES, ramp
from hfcompress.pruning.select import smallest
from tests.conftest import tiny_bert
from tests.distributed import WORLD_SIZE, run_in_two_processes
from tests.forks import Forks
from tests.pruning_runs import (
    MovesEverything,
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

pytestmark = pytest.mark.usefixtures("quick_trainers")

# The default run


@pytest.mark.parametrize("make", [small_llama, tiny_bert, small_gpt2])
def test_class_itself_prunes_half_of_the_layers_and_nothing_else(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model = make()
    trainer = trainer_for(model, tmp_path, [PruneCallback])
    inside = set(matrices(model))
    outside = {name: int((w == 0).sum()) for name, w in model.named_parameters() if name not in inside}
    assert any("norm" in name.lower() or "ln_" in name for name in outside)
    trainer.train()
    assert count_zeros(zeros_of(matrices(model))) == half_of(model) > 1000
    # the embedding's padding row and biases are zero at first, and may be learnt
    after = dict(model.named_parameters())
    assert all(int((after[name] == 0).sum()) <= zeros for name, zeros in outside.items())


def test_layer_scope_prunes_every_matrix_alike(tmp_path: Path) -> None:
    model = small_llama()
    # in global scope the smaller matrix would lose everything first
    next(iter(matrices(model).values())).mul_(1e-3)
    trainer_for(model, tmp_path, [PruneCallback(sparsity=0.3, scope="layer")], learning_rate=0.0).train()
    for weight in matrices(model).values():
        assert int((weight == 0).sum()) == int(0.3 * weight.numel())


def test_global_scope_takes_the_smallest_weights_of_all(tmp_path: Path) -> None:
    model = small_llama()
    everything = torch.cat([weight.abs().flatten() for weight in matrices(model).values()])
    threshold = everything.sort().values[half_of(model) - 1]
    expected = {name: weight.abs() <= threshold for name, weight in matrices(model).items()}
    trainer_for(model, tmp_path, [PruneCallback], learning_rate=0.0).train()
    assert same_tensors(zeros_of(matrices(model)), expected)


# Masks hold

OPTIMIZERS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "adamw": lambda model: {},
    "sgd_momentum": lambda model: {
        "optimizers": (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), None)
    },
    "moves_everything": lambda model: {"optimizers": (MovesEverything(model.parameters()), None)},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", [small_llama, tiny_bert])
def test_pruned_weights_stay_zero_everywhere(
    make: Callable[[], PreTrainedModel], optimizer: str, tmp_path: Path
) -> None:
    model = make()
    watch = Watch()
    trainer = trainer_for(
        model, tmp_path, [watch, PruneCallback(end=0.5)], max_steps=12, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=2, **OPTIMIZERS[optimizer](model),
    )  # fmt: skip
    trainer.train()

    assert sorted(watch.after) == list(range(1, 13))
    shares = [share_of(watch.after[step]) for step in range(1, 13)]
    assert shares[:6] == sorted(set(shares[:6]))  # rises at every step of the ramp
    for before, after in pairwise(range(1, 13)):
        # a pruned weight never comes back
        assert all(bool((watch.after[after][n] | ~zero).all()) for n, zero in watch.after[before].items())
    for step in range(6, 13):
        assert same_tensors(watch.after[step], watch.after[6])
        assert count_zeros(watch.after[step]) == half_of(model)

    assert sorted(watch.evaluated) == [2, 4, 6, 8, 10, 12]
    reported = {entry["step"]: entry["sparsity"] for entry in trainer.state.log_history if "eval_loss" in entry}
    for step, zeros in watch.evaluated.items():
        assert same_tensors(zeros, watch.after[step])
        assert reported[step] == pytest.approx(share_of(zeros), abs=1e-12)

    for step in (1, 5, 12):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert same_tensors(zeros_of({name: saved[name] for name in watch.after[step]}), watch.after[step])


def test_what_something_else_moved_is_zero_again_when_evaluated_and_saved(tmp_path: Path) -> None:
    class Jog(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for weight in matrices(kwargs["model"]).values():
                weight.add_(0.01)

    watch, options = Watch(), {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    trainer_for(tiny_bert(), tmp_path, [PruneCallback(end=0.2), Jog(), watch], **options).train()
    saved = load_file(tmp_path / "checkpoint-10" / "model.safetensors")
    assert count_zeros(watch.evaluated[5]) == count_zeros(watch.evaluated[10]) == half_of(tiny_bert())
    assert same_tensors(zeros_of({name: saved[name] for name in watch.evaluated[10]}), watch.evaluated[10])


def test_what_another_callback_writes_at_an_epochs_end_is_pruned_when_evaluated_and_saved(tmp_path: Path) -> None:
    class Averaged(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for weight in matrices(kwargs["model"]).values():
                weight.data.add_(0.01)

    watch, options = (
        Watch(),
        {"save_strategy": "epoch", "eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    )
    trainer_for(tiny_bert(), tmp_path, [Averaged(), PruneCallback(end=0.2), watch], **options).train()
    assert len(watch.evaluated) == 2
    for step, zeros in watch.evaluated.items():
        assert count_zeros(zeros) == half_of(tiny_bert())
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert same_tensors(zeros_of({name: saved[name] for name in zeros}), zeros)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"amsgrad": True, "maximize": True}),
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_optimizers_that_keep_zeros_keep_them(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    weight, mask = nn.Parameter(torch.randn(16, 16)), torch.rand(16, 16) > 0.5
    optimizer = kind([weight], lr=0.1, **options)
    assert keeps_zeros(optimizer)
    for step in range(8):
        if step == 3:  # with moments from when all were alive
            weight.data.mul_(mask)
            clear_moments_(optimizer, {"w": weight}, {"w": mask})
        before = weight.detach().clone()
        weight.grad = torch.randn(16, 16) * (mask if step >= 3 else 1)
        optimizer.step()
        assert torch.equal(weight != 0, mask if step >= 3 else torch.ones_like(mask))
        assert bool((weight != before)[mask].all())


def test_optimizers_that_may_move_zeros_are_told_apart() -> None:
    weight = nn.Parameter(torch.ones(2, 2))

    class Own(torch.optim.AdamW):
        """A class of somebody's own may do anything after AdamW's step."""

    assert not keeps_zeros(Own([weight]))
    assert not keeps_zeros(MovesEverything(iter([weight])))
    assert not keeps_zeros(torch.optim.AdamW([{"params": [weight], "eps": 0.0}]))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_moments_of_pruned_weights_are_zero(optim: str, tmp_path: Path) -> None:
    model = small_llama()
    momentum = {"optim_args": "momentum=0.9"} if optim == "sgd" else {}
    trainer = trainer_for(model, tmp_path, [PruneCallback], optim=optim, **momentum)
    seen = []

    class Moments(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for name, weight in model.named_parameters():
                if name in matrices(model):
                    values = kwargs["optimizer"].state[weight]
                    for kind in values.keys() & {"exp_avg", "exp_avg_sq", "momentum_buffer"}:
                        seen.append(kind)
                        assert not values[kind][weight == 0].any(), (name, kind, state.global_step)
                        assert values[kind][weight != 0].any()

    trainer.add_callback(Moments())
    trainer.train()
    kinds = {"momentum_buffer"} if optim == "sgd" else {"exp_avg", "exp_avg_sq"}
    assert set(seen) == kinds
    assert len(seen) == 10 * len(kinds) * len(matrices(model))


def test_quantized_moments_are_left_alone() -> None:
    # 8-bit optimizers keep codes: the code 0 is not the number 0 but the lowest of a block
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([weight])
    codes = torch.full((2, 2), 127, dtype=torch.uint8)
    optimizer.state[weight] = {"state1": codes, "exp_avg": torch.ones(2, 2)}
    clear_moments_(optimizer, {"w": weight}, {"w": torch.tensor([[True, False], [True, True]])})
    assert bool((codes == 127).all())
    assert optimizer.state[weight]["exp_avg"].tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_model_that_is_sparse_already_keeps_its_zeros(sparsity: float, tmp_path: Path) -> None:
    model = small_llama()
    for weight in matrices(model).values():
        weight.mul_(torch.rand_like(weight) > 0.7)
    before = zeros_of(matrices(model))
    assert 0.69 < share_of(before) < 0.71
    watch = Watch()
    trainer_for(model, tmp_path, [PruneCallback(sparsity=sparsity), watch]).train()
    for zeros in watch.after.values():
        assert all(bool(zeros[name][before[name]].all()) for name in before)
    if sparsity == 0.5:
        assert same_tensors(watch.after[10], before)
    else:
        assert count_zeros(watch.after[10]) == int(0.8 * sum(one.numel() for one in before.values()))


# Resuming


@pytest.mark.parametrize("end", [0.3, 0.9])
@pytest.mark.parametrize("make", [small_llama, tiny_bert])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(make: Any, end: float, tmp_path: Path) -> None:
    options = {"max_steps": 12, "save_steps": 6, "gradient_accumulation_steps": 2}
    whole = trainer_for(make(), tmp_path / "whole", [PruneCallback(sparsity=0.7, end=end)], **options)
    whole.train()
    stopped = trainer_for(
        make(), tmp_path, [PruneCallback(sparsity=0.7, end=end), StopAt(6)], save_strategy="steps", **options
    )
    stopped.train()
    assert stopped.state.global_step == 6
    resumed = trainer_for(make(seed=1), tmp_path, [PruneCallback(sparsity=0.7, end=end)], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.state.global_step == 12
    assert not same_tensors(state_of(stopped), state_of(whole))
    assert same_tensors(state_of(resumed), state_of(whole))
    assert any(key.endswith("exp_avg") for key in state_of(whole))


def test_what_became_zero_before_a_checkpoint_stays_so_in_both_runs(tmp_path: Path) -> None:
    class Zero(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                next(iter(matrices(kwargs["model"]).values())).data[0] = 0

    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    whole = trainer_for(tiny_bert(), tmp_path, [PruneCallback(sparsity=0.7, end=0.3), Zero()], **options)
    whole.train()
    resumed = trainer_for(tiny_bert(seed=1), tmp_path / "on", [PruneCallback(sparsity=0.7, end=0.3)], max_steps=12)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert not next(iter(matrices(whole.model).values()))[0].any()
    assert same_tensors(state_of(resumed), state_of(whole))


def test_saving_does_not_change_the_run(tmp_path: Path) -> None:
    plain = trainer_for(small_llama(), tmp_path / "plain", [PruneCallback])
    saving = trainer_for(small_llama(), tmp_path, [PruneCallback], save_strategy="steps", save_steps=3)
    plain.train()
    saving.train()
    assert same_tensors(state_of(plain), state_of(saving))


def test_checkpoint_written_without_the_callback_resumes_with_it(tmp_path: Path) -> None:
    trainer_for(small_llama(), tmp_path, [StopAt(5)], save_strategy="steps", save_steps=5).train()
    model = small_llama(seed=1)
    watch = Watch()
    trainer_for(model, tmp_path, [PruneCallback, watch]).train(resume_from_checkpoint=True)
    assert list(watch.after) == [6, 7, 8, 9, 10]
    assert 0 < count_zeros(watch.after[6]) < half_of(model)
    assert count_zeros(watch.after[10]) == half_of(model)


# Accumulation and clipping


@pytest.mark.parametrize("make", [small_llama, tiny_bert])
def test_masks_do_not_depend_on_how_a_batch_is_split(make: Any, tmp_path: Path) -> None:
    found = []
    for size, steps in ((8, 1), (2, 4)):
        model = make()
        initial = zeros_of({n: w.where(w.abs() > w.abs().median(), 0) for n, w in matrices(model).items()})
        # Plain SGD and no clipping: the step is as wrong as the gradient.
        trainer = trainer_for(
            model, tmp_path, [PruneCallback(sparsity=0.5, scope="layer")], per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, optim="sgd", learning_rate=0.5, max_grad_norm=0.0,
        )  # fmt: skip
        if make is tiny_bert:
            trainer.loss_is_scaled_for_ga = False  # https://github.com/huggingface/transformers/issues/47688
        trainer.train()
        found.append(matrices(model))
        assert not same_tensors(zeros_of(found[-1]), initial)  # training has moved the masks
    assert same_tensors(zeros_of(found[0]), zeros_of(found[1]))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
def test_clipping_sees_only_the_gradients_of_live_weights(steps: int, tmp_path: Path) -> None:
    model = small_llama()
    rows = text_rows(8)
    # With no learning rate only the masks change, and with one batch per step the order of rows does not matter.
    trainer = trainer_for(
        model, tmp_path, [PruneCallback(sparsity=0.9, end=1.0)], rows=rows, max_steps=6, learning_rate=0.0,
        per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps,
    )  # fmt: skip
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    live, everything = {}, {}

    class Manual(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            twin = small_llama()
            twin.load_state_dict(model.state_dict())
            twin(**batch).loss.backward()
            gradients = {name: weight.grad for name, weight in twin.named_parameters()}
            everything[state.global_step + 1] = nn.utils.get_total_norm(list(gradients.values())).item()
            for name, weight in matrices(twin).items():
                gradients[name].mul_(weight != 0)
            live[state.global_step + 1] = nn.utils.get_total_norm(list(gradients.values())).item()

    trainer.add_callback(Manual())
    trainer.train()
    logged = {entry["step"]: entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry}
    assert logged.keys() == live.keys() == set(range(1, 7))
    assert everything[6] > 1.02 * live[6]
    for step, norm in live.items():
        assert logged[step] == pytest.approx(norm, rel=1e-5)


def test_hooks_go_away_with_the_run(tmp_path: Path) -> None:
    model = small_llama()
    trainer_for(model, tmp_path, [PruneCallback]).train()
    model.train()
    model(**{name: torch.stack([row[name] for row in text_rows(8)]) for name in text_rows(1)[0]}).loss.backward()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.grad[weight == 0].all()


class _Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("criterion", ["magnitude", "activation"])
def test_a_cut_off_run_leaves_no_hooks_to_the_next(criterion: str, tmp_path: Path) -> None:
    model = small_llama()
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    callbacks = [PruneCallback(0.8, criterion=criterion), NeuronPruneCallback(0.5), _Interrupt()]
    with pytest.raises(KeyboardInterrupt):
        trainer_for(model, tmp_path, callbacks).train()
    model.load_state_dict(dense)
    hooks = len(model._forward_pre_hooks)
    kept = [PruneCallback(0.0, targets=("*.q_proj",)), PruneCallback(0.0, targets=("*.k_proj",), criterion=criterion)]
    during: list[int] = []

    class Count(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            attention = kwargs["model"].model.layers[0].self_attn
            during.extend(len(one.weight._post_accumulate_grad_hooks) for one in (attention.q_proj, attention.k_proj))

    trainer_for(
        model, tmp_path, [*kept, Count()], max_steps=1, optim="sgd", max_grad_norm=0.0, learning_rate=1.0
    ).train()
    assert during == [1, 1]
    assert len(model._forward_pre_hooks) == hooks - (criterion == "activation")
    for name, weight in matrices(model).items():
        # The cut-off run had pruned half of the weights.
        assert int((weight != dense[name]).sum()) > 0.9 * weight.numel(), name


# The best model


class _Falling:
    """A score that is best at the first evaluation, as a dense model's would be."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.calls += 1
        return {"score": -self.calls}


@pytest.mark.parametrize("early_stopping", ["no", "before", "after"])
@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_best_model_is_never_denser_than_the_target(early_stopping: str, strategy: str, tmp_path: Path) -> None:
    model = small_llama()
    callbacks: list[TrainerCallback] = [PruneCallback(sparsity=0.5, end=0.6)]
    if early_stopping != "no":
        callbacks.insert(0 if early_stopping == "before" else 1, EarlyStoppingCallback(early_stopping_patience=2))
    trainer = trainer_for(
        model, tmp_path, callbacks, eval_strategy="steps", eval_steps=1, save_strategy=strategy, save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        compute_metrics=_Falling(),
    )  # fmt: skip
    trainer.train()
    # the sixth evaluation is the first at full sparsity, and the best of those that count
    assert trainer.state.best_global_step == 6
    assert trainer.state.global_step == (10 if early_stopping == "no" else 8)
    assert count_zeros(zeros_of(matrices(model))) == half_of(model)
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in matrices(model).items())


# The schedule


@pytest.mark.parametrize("name", ["linear", "cubic"])
def test_schedule_goes_from_nothing_to_the_target(name: str) -> None:
    values = [SCHEDULES[name](step, 10, 30, 0.8) for step in range(41)]
    assert values[:11] == [0.0] * 11
    assert values[30:] == [0.8] * 11
    assert all(before < after for before, after in pairwise(values[10:31]))
    assert values[20] == pytest.approx(0.8 * {"linear": 0.5, "cubic": 1 - 0.5**3}[name])
    assert values[15] == pytest.approx(0.8 * {"linear": 0.25, "cubic": 1 - 0.75**3}[name])


def test_schedules_without_a_ramp() -> None:
    assert set(SCHEDULES) == {"linear", "cubic", "oneshot", "constant"}
    assert ramp("oneshot", 0.25, 0.9, 40) == (10, 11)
    assert ramp("oneshot", 0.0, 0.9, 1) == (0, 1)
    assert [SCHEDULES["oneshot"](step, 10, 11, 0.8) for step in (0, 10, 11, 12)] == [0.0, 0.0, 0.8, 0.8]
    assert ramp("constant", 0.25, 0.9, 40) == (0, 0)
    assert [SCHEDULES["constant"](step, 0, 0, 0.8) for step in (0, 1, 40)] == [0.8] * 3


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.7), (0.0, 0.01), (0.0, 1.0), (0.5, 0.6), (0.9, 1.0), (0.99, 1.0)])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_target_is_reached_inside_every_run(steps: int, start: float, end: float) -> None:
    callback = PruneCallback(start=start, end=end, frequency=3)
    state = TrainerState(max_steps=steps)
    due = [step for step in range(1, steps + 1) if callback._is_due(step, state)]
    assert due
    assert callback.sparsity_at(due[-1], state) == callback.sparsity_at(steps, state) == 0.5
    assert due[-1] == max(int(start * steps) + 1, round(end * steps))
    assert callback.sparsity_at(int(start * steps), state) == 0.0


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.1), (0.6, 1.0)])
def test_shortest_runs_reach_the_target(steps: int, start: float, end: float, tmp_path: Path) -> None:
    model = tiny_bert()
    trainer_for(model, tmp_path, [PruneCallback(start=start, end=end)], max_steps=steps).train()
    assert count_zeros(zeros_of(matrices(model))) == half_of(model)


def test_masks_change_only_between_start_and_end_and_every_frequency_steps(tmp_path: Path) -> None:
    watch = Watch()
    callback = PruneCallback(start=0.2, end=0.8, frequency=4, schedule="linear", sparsity=0.6)
    model = tiny_bert()
    trainer_for(model, tmp_path, [callback, watch], max_steps=20).train()
    total = sum(weight.numel() for weight in matrices(model).values())
    expected = {4: 0.0, 7: 0.0, 8: 0.2, 11: 0.2, 12: 0.4, 15: 0.4, 16: 0.6, 20: 0.6}
    assert {s: count_zeros(watch.after[s]) for s in expected} == {
        s: int(v * total + 1e-6) for s, v in expected.items()
    }


# Selection


def _scores(kind: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 13), (1,), (3, 5, 11), (64, 2)]
    random = [torch.randn(shape, generator=generator).abs() for shape in shapes]
    if kind == "ties":
        random = [(one * 2).round() / 2 for one in random]
    elif kind == "zeros":
        random = [one * (torch.rand(one.shape, generator=generator) > 0.6) for one in random]
    elif kind == "denormals":
        random = [one * 1e-39 for one in random]
    elif kind == "equal":
        random = [torch.full(one.shape, 0.25) for one in random]
    return [one.to(dtype) for one in random]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "denormals", "equal"])
def test_smallest_equals_a_stable_sort(kind: str, dtype: torch.dtype) -> None:
    scores = _scores(kind, dtype)
    flat = torch.cat([one.flatten() for one in scores])
    if kind == "denormals" and dtype != torch.float16:
        assert 0 < flat.max() < 1e-38
    order = flat.sort(stable=True).indices
    for count in (-1, 0, 1, 2, 91, 92, 93, 150, flat.numel() - 1, flat.numel(), flat.numel() + 5):
        expected = torch.zeros(flat.numel(), dtype=torch.bool)
        expected[order[: max(count, 0)]] = True
        found = smallest(scores, count)
        assert [one.shape for one in found] == [one.shape for one in scores]
        assert torch.equal(torch.cat([one.flatten() for one in found]), expected), count


# What is pruned


def test_tied_weights_are_pruned_once(tmp_path: Path) -> None:
    model = small_llama()
    targets = ("*embed_tokens", "lm_head")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert list(prunable_weights(model, targets)) == ["model.embed_tokens.weight"]
    assert list(prunable_weights(small_llama(tie_word_embeddings=False), targets)) == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]
    trainer_for(model, tmp_path, [PruneCallback(targets=targets)]).train()
    assert int((model.lm_head.weight == 0).sum()) == model.lm_head.weight.numel() // 2
    assert count_zeros(zeros_of(matrices(model))) == 0


def test_targets_and_exclude_choose_by_module_name() -> None:
    model = small_llama()
    assert list(prunable_weights(model, exclude=("*.mlp.*", "model.layers.0.*"))) == [
        f"model.layers.1.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    assert list(prunable_weights(model, targets=("*.up_proj",), exclude=("*.0.*",))) == [
        "model.layers.1.mlp.up_proj.weight"
    ]
    # norms match "*", but have no matrix
    assert not any("norm" in name for name in prunable_weights(model, targets=("*",)))


def test_conv1d_of_gpt2_is_pruned() -> None:
    names = list(prunable_weights(small_gpt2()))
    assert [name for name in names if ".h.0." in name] == [
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_two_callbacks_prune_their_own_targets(tmp_path: Path) -> None:
    model = small_llama()
    attention = PruneCallback(sparsity=0.25, targets=("*.self_attn.*",))
    mlp = PruneCallback(sparsity=0.75, targets=("*.mlp.*",), end=0.4)
    trainer_for(model, tmp_path, [attention, mlp]).train()
    zeros = zeros_of(matrices(model))
    for part, share in ((".self_attn.", 0.25), (".mlp.", 0.75)):
        inside = {name: zero for name, zero in zeros.items() if part in name}
        assert count_zeros(inside) == int(share * sum(zero.numel() for zero in inside.values()))


def test_sparsity_by_layer_counts_each_layer() -> None:
    model = small_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    share = model.model.layers[1].mlp.up_proj.weight.numel() / (half_of(model))
    assert sparsity_by_layer(model, prunable_weights(model)) == {
        "model.layers.0": 0.0,
        "model.layers.1": pytest.approx(share),
    }


# Refusals and warnings


def _refused_at_start(model: PreTrainedModel, callback: PruneCallback, folder: Path, match: str, **flags: Any) -> None:
    """Check that training raises before a step is made."""
    trainer = trainer_for(model, folder, [callback])
    for name, value in flags.items():
        setattr(trainer.args, name, value)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(HFCompressError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0
    after = model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(), weight.nan_to_num()) for name, weight in before.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_without_an_order_is_refused_by_name(bad: float, tmp_path: Path) -> None:
    model = small_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = bad
    _refused_at_start(model, PruneCallback(), tmp_path, r"'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN")


@pytest.mark.parametrize("flag", ["fsdp", "deepspeed"])
def test_sharded_training_is_refused(flag: str, tmp_path: Path) -> None:
    _refused_at_start(small_llama(), PruneCallback(), tmp_path, "FSDP or DeepSpeed shards", **{flag: True})


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharding_that_the_launcher_chose_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `accelerate launch --use_fsdp` leaves TrainingArguments.fsdp empty
    trainer = trainer_for(small_llama(), tmp_path, [])
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType[kind])
    with pytest.raises(HFCompressError, match="FSDP or DeepSpeed shards"):
        PruneCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_no_match_shows_names_that_exist(tmp_path: Path) -> None:
    callback = PruneCallback(targets=("*.query",))
    _refused_at_start(
        small_llama(), callback, tmp_path, r"targets=\['\*\.query'\].*model\.layers\.0\.self_attn\.q_proj"
    )
    with pytest.raises(ModelError, match=r"exclude=\['\*'\]"):
        prunable_weights(small_llama(), exclude=("*",))


def test_unknown_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(HFCompressError, match=r"no option 'scedule'\. Did you mean 'schedule'"):
        PruneCallback(scedule="linear")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"start": 0.7, "end": 0.7}, r"start=0\.7 must lie before end=0\.7"),
        ({"end": 1.1}, "less than or equal to 1"),
        ({"frequency": 0}, "greater than or equal to 1"),
        ({"schedule": "cubik"}, "'cubic', 'linear', 'oneshot' or 'constant'"),
        ({"criterion": "magnitud"}, "'magnitude'"),
        ({"scope": "model"}, "'global' or 'layer'"),
    ],
)
def test_values_out_of_range_are_refused_before_training(options: dict[str, Any], match: str) -> None:
    with pytest.raises(HFCompressError, match=match):
        PruneCallback(**options)


def test_callback_from_options_has_these_options() -> None:
    options = PruneOptions(sparsity=0.3, scope="layer", exclude=("a",))
    assert PruneCallback.from_options(options).options == options


def test_run_that_ends_too_early_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hfcompress"):
        for scope in ("global", "layer"):
            trainer_for(tiny_bert(), tmp_path, [PruneCallback(scope=scope, sparsity=0.333)]).train()
        assert not [record for record in caplog.records if "PruneCallback" in record.message]
        trainer_for(tiny_bert(), tmp_path, [PruneCallback, StopAt(3)]).train()
    (message,) = [record.message for record in caplog.records if "PruneCallback" in record.message]
    assert "ended at step 3 with sparsity 0.4" in message
    assert "below the target 0.5, which the schedule reaches at step 7" in message


# Two processes


def _prune_in_one_process(folder: str) -> None:
    model = small_llama()
    trainer = trainer_for(
        model, Path(folder), [PruneCallback], per_device_train_batch_size=2, ddp_backend="gloo", max_grad_norm=0.05
    )
    trainer.train()
    rank = trainer.args.process_index
    state = {id(weight): values for weight, values in trainer.optimizer.state.items()}
    moments = {name: state[id(weight)]["exp_avg"] for name, weight in model.named_parameters()}
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    torch.save((trainer.args.world_size, matrices(model), moments, norms), Path(folder) / f"{rank}.pt")


@pytest.mark.distributed
def test_two_processes_prune_the_same_weights(tmp_path: Path, forks: Forks) -> None:
    run_in_two_processes(forks, _prune_in_one_process, str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD_SIZE)]
    assert [size for size, *_ in results] == [WORLD_SIZE] * WORLD_SIZE
    (_, weights, moments, norms), (_, other_weights, other_moments, other_norms) = results
    assert count_zeros(zeros_of(weights)) == half_of(small_llama())
    assert same_tensors(weights, other_weights)
    assert same_tensors(moments, other_moments)
    assert norms == other_norms
    for name, weight in weights.items():
        assert not moments[name][weight == 0].any()
        assert moments[name][weight != 0].any()

    # the same rows in one process
    model = small_llama()
    trainer_for(model, tmp_path, [PruneCallback], per_device_train_batch_size=4, max_grad_norm=0.05).train()
    different = sum(int((a ^ b).sum()) for a, b in zip(zeros_of(weights).values(), zeros_of(matrices(model)).values()))
    assert different <= 2  # sums in another order
