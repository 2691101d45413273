"""Teachers stay as they are, whatever they are: several, quantized, in another dtype, placed by a device map."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.distillation import cache_teacher
from hfcompress.errors import ModelError
from hfcompress.quantization import RTN, quantize
from tests.conftest import VOCABULARY_SIZE
from tests.distilling import (
    TEMPERATURE,
    Rows,
    bert,
    class_rows,
    distiller,
    equal,
    llama,
    stack,
    text_rows,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("quick_trainers")


def test_teacher_is_untouched_and_stays_out(tmp_path: Path) -> None:
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    student, teacher = bert(), bert(seed=1, **dropout)
    teacher.train()
    before = weights_of(teacher)
    modes = []
    teacher.register_forward_hook(
        lambda module, args, output: modes.append(
            (any(one.training for one in module.modules()), output.logits.requires_grad)
        )
    )
    trainer = distiller(
        student, teacher, tmp_path, max_steps=3, save_strategy="steps", save_steps=3, optim="adamw_torch"
    )
    trainer.train()
    assert modes == [(False, False)] * 3
    assert equal(weights_of(teacher), before)
    assert all(weight.grad is None for weight in teacher.parameters())
    optimized = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert optimized == {id(weight) for weight in student.parameters()}
    assert load_file(tmp_path / "checkpoint-3" / "model.safetensors").keys() == student.state_dict().keys()


def _distilbert() -> PreTrainedModel:
    torch.manual_seed(0)
    return hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(
            vocab_size=VOCABULARY_SIZE, dim=32, hidden_dim=64, n_layers=1, n_heads=4, num_labels=3, pad_token_id=0
        )
    )


def test_columns_that_only_the_teacher_takes_reach_it(tmp_path: Path) -> None:
    columns = {name: value.tolist() for name, value in stack(class_rows()).items()}
    columns["token_type_ids"] = [[index % 2] * 8 for index in range(16)]
    data = Dataset.from_dict({**columns, "text": ["nobody takes this"] * 16})
    teacher = bert(seed=1)
    seen: list[dict] = []
    teacher.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    student = _distilbert()
    got: list[set[str]] = []
    student.register_forward_pre_hook(lambda module, args, kwargs: got.append(set(kwargs)), with_kwargs=True)
    trainer = distiller(student, teacher, tmp_path, data)
    trainer.train()
    types = {
        tuple(ids.tolist()): segment.tolist() for ids, segment in zip(seen[0]["input_ids"], seen[0]["token_type_ids"])
    }
    assert types == {ids: columns["token_type_ids"][columns["input_ids"].index(list(ids))] for ids in types}
    assert {0, 1} <= {segment[0] for segment in types.values()}
    assert "labels" not in seen[0]
    assert "text" not in seen[0]
    # none of it breaks the student, with labels or without
    trainer.evaluate()
    assert trainer.predict(data.remove_columns("labels")).predictions.shape == (16, 3)
    assert all("token_type_ids" not in names for names in got)


# Several


def kd_of(teacher: Any, folder: Path, **options: Any) -> tuple[float, dict[str, Tensor]]:
    """Train a student for one step; return the distillation term and what its weights have moved by."""
    student = llama()
    before = weights_of(student)
    trainer = distiller(student, teacher, folder, text_rows()[:8], alpha=1.0, **options)
    trainer.train()
    return trainer.state.log_history[0]["kd_loss"], {n: w - before[n] for n, w in weights_of(student).items()}


def test_several_teachers_are_their_weighted_mean(tmp_path: Path) -> None:
    (one, first), (other, second) = (kd_of(llama(seed=seed), tmp_path) for seed in (1, 2))
    both, moved = kd_of([llama(seed=1), llama(seed=2)], tmp_path, teacher_weights=[3, 1])
    assert one != pytest.approx(other, rel=0.01)
    assert both == pytest.approx(0.75 * one + 0.25 * other, rel=1e-5)
    for name, step in moved.items():
        torch.testing.assert_close(step, 0.75 * first[name] + 0.25 * second[name], rtol=1e-4, atol=1e-6)
    equally, _ = kd_of([llama(seed=1), llama(seed=2)], tmp_path)
    assert equally == pytest.approx((one + other) / 2, rel=1e-5)


def test_a_model_and_answers_on_disk_teach_together(tmp_path: Path) -> None:
    rows = class_rows()
    cache_teacher(bert(seed=2), rows, tmp_path / "cache")
    results = []
    for second in (bert(seed=2), tmp_path / "cache"):
        trainer = distiller(bert(), [bert(seed=1), second], tmp_path, rows)
        trainer.train()
        results.append(trainer.state.log_history[0]["kd_loss"])
    assert results[1] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0], "2 teachers, but 1 teacher_weights"), ([0.0, 0.0], "not all 0"), ([-1.0, 2.0], "must be 0 or more")],
)
def test_shares_that_cannot_be_are_refused(weights: list[float], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        distiller(llama(), [llama(seed=1), llama(seed=2)], tmp_path, teacher_weights=weights)


# Quantized, in another dtype, on other devices


def test_a_quantized_teacher_teaches_what_it_says(tmp_path: Path) -> None:
    teacher = llama(seed=1)
    quantize(teacher, RTN(bits=4, group_size=16))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    dense, _ = kd_of(llama(seed=1), tmp_path)
    found, _ = kd_of(teacher, tmp_path)
    assert found == pytest.approx(reference_kd(llama(), copy.deepcopy(teacher), text_rows()[:8]), rel=1e-4)
    assert found != pytest.approx(dense, rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    "how", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}], ids=["nf4", "int8"]
)
def test_a_bitsandbytes_teacher_teaches_what_it_says(how: dict[str, Any], tmp_path: Path) -> None:
    dense = llama(seed=1, hidden_size=64, intermediate_size=128)
    dense.save_pretrained(tmp_path / "teacher")
    teacher = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher", quantization_config=hf.BitsAndBytesConfig(**how), dtype=torch.float32
    )
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    expected = reference_kd(llama(), teacher, text_rows()[:8])
    found, moved = kd_of(teacher, tmp_path)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found != pytest.approx(kd_of(dense, tmp_path)[0], rel=1e-4)
    assert all(step.isfinite().all() for step in moved.values())
    inside = {"temperature": None, "losses": ["hidden_states"]}
    assert kd_of(teacher, tmp_path, **inside)[0] == pytest.approx(kd_of(dense, tmp_path, **inside)[0], rel=0.2)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def reference_kd(student: PreTrainedModel, teacher: PreTrainedModel, rows: Rows) -> float:
    """Return the mean forward KL over labelled places, of whole batches."""
    batch = stack(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    counted = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        own, other = (
            model.eval()(**inputs).logits[:, :-1][counted].double() / TEMPERATURE for model in (student, teacher)
        )
    p = other.softmax(-1)
    return float((p * (other.log_softmax(-1) - own.log_softmax(-1))).sum() / counted.sum()) * TEMPERATURE**2


def test_a_quantized_teachers_answers_can_be_kept(tmp_path: Path) -> None:
    teacher = llama(seed=1)
    quantize(teacher, RTN(bits=4, group_size=16))
    cache_teacher(teacher, text_rows(), tmp_path / "cache", k=64)
    losses = {"temperature": None, "losses": [{"top_k_kl": {"k": 64}}]}
    live, kept = (kd_of(one, tmp_path, **losses)[0] for one in (teacher, tmp_path / "cache"))
    assert kept == pytest.approx(live, rel=1e-3)


@pytest.mark.parametrize("losses", [None, ["hidden_states"]])
def test_a_teacher_in_bfloat16_stays_so_and_teaches_nearly_the_same(losses: Any, tmp_path: Path) -> None:
    options = {} if losses is None else {"temperature": None, "losses": losses}
    exact, _ = kd_of(llama(seed=1), tmp_path, **options)
    teacher = llama(seed=1).to(torch.bfloat16)
    found, moved = kd_of(teacher, tmp_path, **options)
    assert found == pytest.approx(exact, rel=0.02)
    assert found != exact
    assert {weight.dtype for weight in teacher.parameters()} == {torch.bfloat16}
    assert {step.dtype for step in moved.values()} == {torch.float32}


def test_a_teacher_that_a_device_map_placed_is_not_moved(tmp_path: Path) -> None:
    llama(seed=1).save_pretrained(tmp_path / "teacher")
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
             "model.layers.0": "cpu", "model.layers.1": "disk"}  # fmt: skip
    teacher = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher", device_map=where, offload_folder=str(tmp_path / "offloaded")
    )
    assert {weight.device.type for weight in teacher.model.layers[1].parameters()} == {"meta"}
    expected, _ = kd_of(llama(seed=1), tmp_path)
    found, _ = kd_of(teacher, tmp_path)
    assert found == pytest.approx(expected, rel=1e-5)
    assert {weight.device.type for weight in teacher.model.layers[1].parameters()} == {"meta"}
