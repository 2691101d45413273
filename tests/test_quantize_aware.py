"""Quantization-aware training: what is trained with is exported, and checkpoints hold the unrounded weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

import hfcompress
from hfcompress.errors import HFCompressError, ModelError
from hfcompress.packed import packed_layers
from hfcompress.pruning import PruneCallback
from hfcompress.quantization import RTN, QuantizeAwareCallback, quantize
from hfcompress.quantization.aware import FakeQuantized, QuantizeAwareOptions
from hfcompress.quantization.aware.layers import fake_quantize_, restore_dense_
from hfcompress.quantization.plan import plan_linears
from tests.checkpointing import checkpoint_activations
from tests.conftest import tiny_bert
from tests.distilling import distiller, llama
from tests.families import FAMILIES, inputs_of
from tests.pruning_runs import (
    StopAt,
    class_rows,
    matrices,
    same_tensors,
    small_gpt2,
    small_llama,
    state_of,
    text_rows,
    trainer_for,
)

pytestmark = pytest.mark.usefixtures("quick_trainers")
GRIDS = {
    "symmetric": {"group_size": 16},
    "affine": {"group_size": None, "symmetric": False, "bits": 3},
    "searched": {"group_size": 16, "scale": "mse", "bits": 2},
    "bfloat16": {"group_size": 16, "dtype": "bfloat16"},
    "everything": {"group_size": 8, "embeddings": True, "head": True},
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {"llama": small_llama, "gpt2": small_gpt2}


def rounding(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    told = QuantizeAwareOptions(**options)
    for one in plan_linears(model, told):
        fake_quantize_(one, told.scale, told.torch_dtype)
    return model


def answers(model: PreTrainedModel, inputs: dict[str, Tensor] | None = None) -> Tensor:
    model.eval()
    with torch.no_grad():
        outputs = model(**(inputs or {"input_ids": torch.arange(6, 54).view(3, 16)}))
    return next(value for value in outputs.values() if isinstance(value, Tensor) and value.dim() > 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_with_what_is_packed(name: str) -> None:
    family = FAMILIES[name]
    model, inputs = family.model(), inputs_of(family)
    before = answers(model, inputs)
    expected = answers(rounding(model, bits=4, group_size=16), inputs)
    assert not torch.equal(before, expected)
    quantize(model, RTN(bits=4, group_size=16))
    assert torch.equal(answers(model, inputs), expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("make", MODELS)
def test_trained_model_is_exported_saved_and_reloaded_exactly(make: str, grid: str, tmp_path: Path) -> None:
    model, callback = MODELS[make](), QuantizeAwareCallback(**GRIDS[grid])
    trainer = trainer_for(model, tmp_path, [callback], max_steps=3)
    trainer.train()
    before = {
        name: one.rounded_weight().detach() for name, one in model.named_modules() if isinstance(one, FakeQuantized)
    }
    expected, loss = answers(model), trainer.evaluate()["eval_loss"]
    with pytest.raises(ModelError, match="export the model"):
        hfcompress.save_compressed(model, tmp_path / "out")
    if grid == "bfloat16":
        callback.export(model)
    else:
        quantize(model, callback.method)
    packed = packed_layers(model)
    assert packed.keys() == before.keys()
    assert all(torch.equal(one.weight.to(before[name].dtype), before[name]) for name, one in packed.items())
    hfcompress.save_compressed(model, tmp_path / "out")
    if grid != "bfloat16":
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(answers(reloaded), expected)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-6)


def test_gradient_is_that_of_the_rounded_weights_and_moves_the_unrounded_ones(tmp_path: Path) -> None:
    model, rows = small_llama(), text_rows(4)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for one in plan_linears(rounded, QuantizeAwareOptions(group_size=16)):
            told = QuantizeAwareOptions(group_size=16)
            copied = copy.deepcopy(one)
            fake_quantize_(copied, told.scale, None)
            assert isinstance(copied.module, FakeQuantized)
            one.module.weight.copy_(copied.module.rounded_weight())
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    rounded(**batch).loss.backward()
    expected = {n: w.detach() - 0.1 * rounded.get_parameter(n).grad for n, w in model.named_parameters()}
    callback = QuantizeAwareCallback(group_size=16)
    options = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer_for(model, tmp_path, [callback], rows=rows, max_steps=1, **options).train()
    for name, weight in model.named_parameters():
        assert torch.allclose(weight, expected[name], atol=1e-7), name
    assert not torch.equal(
        matrices(model)["model.layers.0.mlp.up_proj.weight"], matrices(rounded)["model.layers.0.mlp.up_proj.weight"]
    )


def test_training_for_the_grid_beats_rounding_afterwards(tmp_path: Path) -> None:
    losses = {}
    for name, callbacks in {"after": [], "aware": [QuantizeAwareCallback(bits=2, group_size=16)]}.items():
        trainer = trainer_for(llama(), tmp_path, list(callbacks), max_steps=60, rows=text_rows(8))
        trainer.train()
        quantize(trainer.model, RTN(bits=2, group_size=16))
        losses[name] = trainer.evaluate()["eval_loss"]
    assert losses["aware"] < 0.7 * losses["after"]


def test_checkpoints_hold_the_unrounded_weights(tmp_path: Path) -> None:
    model, callback = small_llama(), QuantizeAwareCallback(group_size=16)
    trainer = trainer_for(model, tmp_path, [callback], max_steps=4, save_strategy="steps", save_steps=4)
    trainer.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert same_tensors(dict(saved.state_dict()), dict(model.state_dict()))
    assert not torch.equal(answers(saved), answers(model))
    restore_dense_(model)
    assert torch.equal(answers(saved), answers(model))
    assert all(type(module) is not FakeQuantized and not hasattr(module, "grid") for module in model.modules())


@pytest.mark.parametrize("make", [small_llama, small_gpt2])
@pytest.mark.parametrize("start", [0.0, 0.5, 0.7])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(start: float, make: Any, tmp_path: Path) -> None:
    def callbacks() -> list[TrainerCallback]:
        return [PruneCallback(sparsity=0.5), QuantizeAwareCallback(group_size=16, start=start)]

    options: dict[str, Any] = {"max_steps": 6, "save_steps": 3}
    whole = trainer_for(make(), tmp_path / "whole", callbacks(), **options)
    whole.train()
    trainer_for(make(), tmp_path, [*callbacks(), StopAt(3)], save_strategy="steps", **options).train()
    fresh = make()
    nn.init.zeros_(next(fresh.parameters()))
    resumed = trainer_for(fresh, tmp_path, callbacks(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert same_tensors(state_of(resumed), state_of(whole))
    assert torch.equal(answers(resumed.model), answers(whole.model))


def test_three_methods_at_once_keep_zeros_and_export_exactly(tmp_path: Path) -> None:
    callbacks: list[TrainerCallback] = [QuantizeAwareCallback(group_size=16), PruneCallback(sparsity=0.5, end=0.5)]
    student = llama(seed=1)
    trainer = distiller(student, llama(), tmp_path, callbacks=callbacks, max_steps=4, learning_rate=0.01)
    trainer.train()
    zeros = {name: weight == 0 for name, weight in matrices(student).items()}
    assert sum(int(one.sum()) for one in zeros.values()) == sum(one.numel() for one in zeros.values()) // 2
    expected = answers(student)
    report = callbacks[0].export(student)  # type: ignore[attr-defined]
    assert len(report.rows) == 14
    assert torch.equal(answers(student), expected)
    for name, one in packed_layers(student).items():
        assert not one.weight[zeros[f"{name}.weight"]].any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_of_a_sparse_model_stay(symmetric: bool, tmp_path: Path) -> None:
    model = small_llama()
    with torch.no_grad():
        for index, weight in enumerate(matrices(model).values()):
            weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(index)) < 0.7] = 0
    zeros = {name: weight == 0 for name, weight in matrices(model).items()}
    aware = QuantizeAwareCallback(group_size=8, symmetric=symmetric, bits=8)
    trainer_for(model, tmp_path, [PruneCallback(sparsity=0.0), aware], max_steps=3).train()
    assert all(torch.equal(weight == 0, zeros[name]) for name, weight in matrices(model).items())
    aware.export(model)
    for name, one in packed_layers(model).items():
        assert not one.weight[zeros[f"{name}.weight"]].any()
        assert one.weight[~zeros[f"{name}.weight"]].any()


def test_only_scores_of_the_rounded_model_choose_the_best(tmp_path: Path) -> None:
    found: dict[int, Tensor] = {}

    class Best(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found[state.global_step] = kwargs["model"].get_parameter("model.norm.weight").detach().clone()

    options: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 8,
        "load_best_model_at_end": True, "learning_rate": 1e-2,
    }  # fmt: skip
    model = small_llama()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, 0] *= (
                50  # the rest of each row is rounded to 0, which costs more than is learnt
            )
    callback = QuantizeAwareCallback(bits=2, group_size=None, start=0.5)
    trainer = trainer_for(model, tmp_path, [callback, Best()], **options)
    trainer.train()
    losses = {one["step"]: one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one}
    best = min(range(5, 9), key=lambda step: losses[step])
    assert min(losses, key=lambda step: losses[step]) < 5
    assert torch.equal(trainer.model.get_parameter("model.norm.weight"), found[best])


def test_accumulation_and_checkpointing_change_nothing(tmp_path: Path) -> None:
    weights = []
    for checkpointing, options in (
        (False, {"per_device_train_batch_size": 8}),
        (False, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        (True, {"per_device_train_batch_size": 8}),
    ):
        model = small_llama()
        if checkpointing:
            checkpoint_activations(model)
        defaults: dict[str, Any] = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
        trainer_for(model, tmp_path, [QuantizeAwareCallback(group_size=16)], **{**defaults, **options}).train()
        weights.append(matrices(model))
    for other in weights[1:]:
        assert all(torch.allclose(weight, other[name], atol=1e-6) for name, weight in weights[0].items())


def test_layer_is_compiled_in_one_piece() -> None:
    model = rounding(small_llama(), group_size=16).train()
    plain = model.model.layers[0].mlp
    torch.compiler.reset()
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    inputs = torch.randn(2, 3, 32)
    found = []
    for layer in (plain, compiled):
        model.zero_grad()
        outputs = layer(inputs)
        outputs.square().sum().backward()
        found.append((outputs, plain.up_proj.weight.grad))
    torch.compiler.reset()
    for one, other in zip(*found):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.slow
def test_compiled_model_trains_as_the_plain_one(tmp_path: Path) -> None:
    torch.compiler.reset()
    found = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        model = tiny_bert(layers=1)
        callback = QuantizeAwareCallback(group_size=16)
        trainer = trainer_for(
            model, tmp_path, [callback], rows=class_rows(8), max_steps=3, learning_rate=1e-3, **options
        )
        trainer.train()
        found.append((matrices(model), trainer.evaluate()["eval_loss"]))
    torch.compiler.reset()
    for name, weight in found[0][0].items():
        assert float((weight - found[1][0][name]).abs().mean()) < 1e-4
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-3)


def test_kept_weights_of_evaluation_follow_every_change() -> None:
    model = rounding(small_llama(), group_size=16, head=True)
    with torch.no_grad():
        plain = answers(model)
        assert torch.equal(answers(model), plain)
        assert torch.equal(
            model.generate(torch.tensor([[6, 7]]), max_new_tokens=4, do_sample=False)[:, :2], torch.tensor([[6, 7]])
        )
        matrices(model)["model.layers.1.mlp.down_proj.weight"].mul_(-1)
        changed = answers(model)
    assert not torch.equal(plain, changed)
    with torch.enable_grad():
        assert torch.equal(model(torch.arange(6, 54).view(3, 16)).logits, changed)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        matrices(model)["model.layers.1.mlp.down_proj.weight"].mul_(-1)
    assert torch.equal(answers(model), plain)
    assert torch.equal(answers(twin), changed)


def test_tied_weights_are_rounded_in_both_places(tmp_path: Path) -> None:
    model, callback = small_llama(), QuantizeAwareCallback(group_size=8, embeddings=True)
    trainer_for(model, tmp_path, [callback], max_steps=2).train()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, FakeQuantized)
    assert isinstance(head, FakeQuantized)
    assert embedding.weight is head.weight
    assert torch.equal(embedding(torch.arange(64)), head.rounded_weight())
    callback.export(model)
    assert torch.equal(model.get_input_embeddings().weight_packed, model.get_output_embeddings().weight_packed)


# Faults, all before the first step


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bit": 4}, r"QuantizeAwareCallback has no option 'bit'. Did you mean 'bits'\?"),
        ({"bits": 5}, r"QuantizeAwareCallback: .*\nbits\n"),
        ({"group_size": 4}, r"QuantizeAwareCallback: .*\ngroup_size\n"),
        ({"start": 1.0}, r"QuantizeAwareCallback: .*\nstart\n"),
        ({"bits": 8, "group_size": None, "activations": 8}, "training rounds weights alone"),
        ({"dtype": "int8"}, r"QuantizeAwareCallback: .*\ndtype\n"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], match: str) -> None:
    with pytest.raises(HFCompressError, match=match):
        QuantizeAwareCallback(**options)


def _packed(model: PreTrainedModel) -> None:
    quantize(model, RTN(bits=8))
    model.config.quantization_config = None


def _damaged(model: PreTrainedModel) -> None:
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        (_packed, {}, "is quantized already"),
        (_damaged, {}, "up_proj.weight holds NaN"),
        (lambda model: None, {"exclude": ("*.upproj",)}, "'.*upproj' matches no module"),
    ],
)
def test_model_that_cannot_be_quantized_is_refused_before_the_first_step(
    change: Callable[[PreTrainedModel], None], options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    model = small_llama()
    change(model)
    trainer = trainer_for(model, tmp_path, [QuantizeAwareCallback(group_size=16, start=0.5, **options)])
    with pytest.raises(ModelError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not any(isinstance(module, FakeQuantized) for module in model.modules())


def test_two_grids_at_once_are_refused(tmp_path: Path) -> None:
    trainer = trainer_for(small_llama(), tmp_path, [QuantizeAwareCallback(8), QuantizeAwareCallback(4)])
    with pytest.raises(HFCompressError, match="There are 2 QuantizeAwareCallbacks"):
        trainer.train()


def test_sharded_training_is_refused(tmp_path: Path) -> None:
    trainer = trainer_for(small_llama(), tmp_path, [QuantizeAwareCallback(group_size=16)])
    trainer.args.deepspeed = "set"
    with pytest.raises(HFCompressError, match="QuantizeAwareCallback needs whole weights"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_export_of_an_untrained_model_is_refused() -> None:
    with pytest.raises(ModelError, match="has no layer that rounds its weight"):
        QuantizeAwareCallback().export(small_llama())


@pytest.mark.parametrize(
    "method", [RTN(bits=8, group_size=16), RTN(bits=4, group_size=16, exclude=("*.up_proj",)), RTN(bits=4)]
)
def test_another_grid_than_trained_for_is_told(method: RTN) -> None:
    model = rounding(small_llama(), group_size=16)
    with pytest.warns(UserWarning, match="layers .* were trained for Grid.bits=4, group_size=16"):
        quantize(model, method)


def test_class_itself_is_a_callback_and_trains_again(tmp_path: Path) -> None:
    model = small_llama(hidden_size=128, intermediate_size=128)
    trainer = trainer_for(model, tmp_path, [QuantizeAwareCallback], max_steps=1)
    trainer.train()
    trainer.train()
    layers = [module for module in model.modules() if isinstance(module, FakeQuantized)]
    assert {(one.grid.bits, one.grid.group_size, one.dense_type) for one in layers} == {(4, 128, nn.Linear)}
    assert len(layers) == 14
