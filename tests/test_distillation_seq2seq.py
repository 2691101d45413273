"""Evaluations that read what an encoder-decoder writes by itself are the plain Seq2SeqTrainer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hfcompress.distillation import Seq2SeqDistillationConfig, Seq2SeqDistillationTrainer, make_student
from tests.conftest import VOCABULARY_SIZE
from tests.distilling import equal, spread, weights_of
from tests.families import FAMILIES

pytestmark = pytest.mark.usefixtures("quick_trainers")

ARGUMENTS: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 0.1,
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
    "logging_steps": 1, "predict_with_generate": True, "generation_max_length": 6,
}  # fmt: skip


def writer(family: str, seed: int) -> PreTrainedModel:
    return spread(FAMILIES[family].model(), seed)


def sources(family: str) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    inputs = {
        "whisper": lambda: {"input_features": torch.randn(8, 32)},
        "t5": lambda: {"input_ids": torch.randint(6, VOCABULARY_SIZE, (9,)), "attention_mask": torch.ones(9).long()},
    }[family]
    return [{**inputs(), "labels": torch.randint(6, VOCABULARY_SIZE, (5,))} for _ in range(8)]


def shares(prediction: Any) -> dict[str, float]:
    """Return what depends on every token that was written."""
    written, wanted = prediction.predictions, prediction.label_ids
    return {"width": float(written.shape[1]), "sum": float(written.sum()), "wanted": float(wanted.sum())}


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_what_the_student_writes_is_evaluated_as_by_the_plain_trainer(family: str, tmp_path: Path) -> None:
    student, teacher, rows = writer(family, 0), writer(family, 1), sources(family)
    shared = {"model": student, "eval_dataset": rows, "compute_metrics": shares}
    plain = Seq2SeqTrainer(args=Seq2SeqTrainingArguments(tmp_path, **ARGUMENTS), **shared)
    ours = Seq2SeqDistillationTrainer(
        args=Seq2SeqDistillationConfig(tmp_path, **ARGUMENTS), teacher_model=teacher, train_dataset=rows, **shared
    )
    for options in ({}, {"max_length": 4, "num_beams": 2}):
        expected, found = plain.evaluate(**options), ours.evaluate(**options)
        assert {"eval_loss", "eval_sum"} <= expected.keys()
        for name in ("eval_loss", "eval_sum", "eval_wanted", "eval_width"):
            assert found[name] == expected[name]
        assert (ours.predict(rows, **options).predictions == plain.predict(rows, **options).predictions).all()
    before = weights_of(student)
    ours.train()
    assert not equal(weights_of(student), before)
    assert "kd_loss" in ours.state.log_history[0]


def test_the_best_student_is_chosen_by_what_it_writes(tmp_path: Path) -> None:
    teacher, rows = writer("t5", 1), sources("t5")
    chosen = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "sum", "greater_is_better": True,
    }  # fmt: skip
    trainer = Seq2SeqDistillationTrainer(
        model=make_student(teacher, layers=1),
        args=Seq2SeqDistillationConfig(tmp_path, **{**ARGUMENTS, **chosen}),
        teacher_model=teacher,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=shares,
    )
    trainer.train()
    sums = [logs["eval_sum"] for logs in trainer.state.log_history if "eval_sum" in logs]
    assert len(sums) == 2
    assert trainer.evaluate()["eval_sum"] == trainer.state.best_metric == max(sums)
