"""What distillation cannot do is said before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hfcompress.distillation import DistillationConfig, DistillationTrainer, cache_teacher
from hfcompress.errors import DataError, HFCompressError, ModelError
from tests.conftest import tiny_bert, word_tokenizer
from tests.distilling import (
    bert,
    distiller,
    llama,
    text_rows,
    token_classifier,
)

pytestmark = pytest.mark.usefixtures("quick_trainers")


def headless_bert() -> PreTrainedModel:
    return hf.BertModel(tiny_bert().config)


def two_heads() -> PreTrainedModel:
    return hf.BertForPreTraining(tiny_bert().config)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (lambda: llama(), lambda: llama(vocab_size=72), "student has 64 classes or tokens and the teacher 72"),
        (lambda: bert(), lambda: bert(num_labels=4), "student has 3 classes or tokens and the teacher 4"),
        (
            lambda: bert(id2label={0: "bad", 1: "fair", 2: "good"}),
            lambda: bert(id2label={0: "bad", 1: "good", 2: "fair"}),
            "Class 1 is 'fair' for the student and 'good' for the teacher",
        ),
        (lambda: bert(problem_type="regression"), lambda: bert(), "gives a class of several, the other numbers"),
        (lambda: bert(), lambda: bert(problem_type="regression"), "gives numbers .*, the other a class of several"),
        (
            lambda: bert(problem_type="multi_label_classification"),
            lambda: bert(),
            "gives a class of several, the other a yes or no for each label",
        ),
        (lambda: bert(), lambda: headless_bert(), "BertModel and cannot answer what a BertForSequenceClassification"),
        (lambda: llama(), lambda: bert(), "BertForSequenceClassification and cannot answer what a LlamaForCausalLM"),
        (lambda: bert(), lambda: [], "teacher_model is an empty list"),
        (lambda: bert(), lambda: nn.Linear(2, 2), "teacher_model must be a transformers PreTrainedModel"),
    ],
    ids=[
        "vocabulary",
        "labels",
        "order",
        "regression",
        "regression teacher",
        "multi-label",
        "no head",
        "other head",
        "none",
        "module",
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(
    student: Callable[[], Any], teacher: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        distiller(student(), teacher(), tmp_path)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (headless_bert, bert, "a BertForSequenceClassification and cannot answer what a BertModel is asked"),
        (two_heads, two_heads, "BertForPreTraining gives .*prediction_logits.* but no logits to distil"),
    ],
)
def test_a_student_without_logits_is_refused_before_the_first_step(
    student: Callable[[], Any], teacher: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        distiller(student(), teacher(), tmp_path, text_rows())


@pytest.mark.parametrize("losses", [None, ["hidden_states"]])
def test_a_classifier_that_reads_other_tokens_is_no_teacher(losses: list[str] | None, tmp_path: Path) -> None:
    own, other = word_tokenizer(["good", "bad"]), word_tokenizer(["bad", "good"])
    options: dict[str, Any] = {"temperature": None, "losses": losses, "processing_class": own}
    distiller(bert(), bert(seed=1), tmp_path, teacher_processing_class=own, **options)
    with pytest.raises(ModelError, match="Token 6 is 'good' for the student and 'bad' for the teacher"):
        distiller(bert(), bert(seed=1), tmp_path, teacher_processing_class=other, **options)


def test_a_student_that_is_its_own_teacher_is_refused_and_can_still_be_trained(tmp_path: Path) -> None:
    student = bert()
    with pytest.raises(ModelError, match="The student is its own teacher"):
        distiller(student, [bert(seed=1), student], tmp_path)
    assert student.training
    assert all(one.requires_grad for one in student.parameters())


def test_liger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="use_liger_kernel leaves no logits"):
        distiller(llama(), llama(), tmp_path, use_liger_kernel=True)


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_policy": {"prompt_tokens": 2}}, "on_policy lets the student write in one process or with DDP"),
        ({"losses": ["hidden_states"], "temperature": None}, "Losses of features work in one process or with DDP"),
    ],
)
def test_what_needs_whole_weights_is_refused_where_accelerate_shards_them(
    kind: str, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # accelerate launch --use_fsdp: the arguments say nothing of it, the Trainer's Accelerator does
    make = Trainer.create_accelerator_and_postprocess

    def sharded(trainer: Trainer) -> None:
        make(trainer)
        setattr(trainer, f"is_{kind}_enabled", True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ModelError, match=message):
        distiller(llama(), llama(seed=1), tmp_path, **options)
    trainer = distiller(llama(), llama(seed=1), tmp_path)  # logits need no hook inside of the student
    assert trainer.own_task_loss
    assert not trainer.takes_logits


def test_plain_training_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="takes a DistillationConfig as args, not a TrainingArguments"):
        DistillationTrainer(llama(), TrainingArguments(tmp_path, use_cpu=True), teacher_model=llama())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be above 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"alpha": -0.1}, "alpha=-0.1 must lie between 0 and 1"),
        ({"alpha": 1.1}, "alpha=1.1 must lie between 0 and 1"),
        ({"alpha": math.nan}, "alpha=nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(HFCompressError, match=message.replace(".", r"\.")):
        DistillationConfig(tmp_path, use_cpu=True, **options)


@pytest.mark.parametrize(("alpha", "why"), [(0.5, "training needs them"), (1, "with alpha=1 too: they say which")])
@pytest.mark.parametrize("make", [llama, bert, token_classifier])
def test_batches_without_labels_are_refused(
    make: Callable[..., PreTrainedModel], alpha: float, why: str, tmp_path: Path
) -> None:
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in text_rows()]
    with pytest.raises(ModelError, match=rf"The batches hold no 'labels', only .*input_ids.*{why}"):
        distiller(make(), make(seed=1), tmp_path, rows, alpha=alpha).train()
    with pytest.raises(ModelError, match=r"no 'labels', only .*input_ids.* the choice of places that count needs"):
        cache_teacher(make(seed=1), rows, tmp_path / "cache")


@pytest.mark.parametrize("cached", [False, True])
def test_labels_for_other_places_are_refused(cached: bool, tmp_path: Path) -> None:
    rows = [{**row, "labels": row["labels"][2:]} for row in text_rows()]
    what = r"The labels are for places \(\d, 6\), but the model answers at \(\d, 8\)"
    if cached:
        with pytest.raises(DataError, match=what):
            cache_teacher(llama(seed=1), rows, tmp_path / "cache")
        return
    trainer = distiller(llama(), llama(seed=1), tmp_path, rows)
    with pytest.raises(DataError, match=what):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_compiled_wrapper_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a OptimizedModule.*torch_compile=True"):
        distiller(torch.compile(llama(), backend="eager"), llama(seed=1), tmp_path, text_rows())


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_layers_that_were_compiled_show_no_features(who: str, tmp_path: Path) -> None:
    models = {"student": llama(), "teacher": llama(seed=1)}
    models[who].model.layers[1].compile(backend="eager")
    with pytest.raises(ModelError, match=f"{who} .*compiled in place.*hooks"):
        distiller(models["student"], models["teacher"], tmp_path, losses=["hidden_states"], temperature=None)
