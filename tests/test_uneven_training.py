"""A reloaded uneven model trains, saves checkpoints and resumes in the Trainer like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments

import hfcompress
from hfcompress.structure.shapes import record_shapes, uneven_shapes
from tests.uneven import FAMILIES, TOKENS, output_of


def trainer(model: PreTrainedModel, folder: Path, **options: Any) -> Trainer:
    rows = [{"input_ids": TOKENS[index % 2] + index % 3, "labels": index % 3} for index in range(8)]
    arguments = TrainingArguments(
        folder, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def reloaded(folder: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("name", ["bert", "llama-classifier"])
def test_trains_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    record_shapes(model)
    model.save_pretrained(tmp_path / "start")
    whole = trainer(reloaded(tmp_path / "start"), tmp_path / "run")
    assert not whole.model.is_quantized
    whole.train()
    first = tmp_path / "run" / "checkpoint-2"
    assert json.loads((first / "config.json").read_text())["quantization_config"]["quant_method"] == "hfcompress"
    resumed = trainer(reloaded(first), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(first))
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.model.state_dict().items())
    again = reloaded(tmp_path / "resumed" / "checkpoint-4")
    assert torch.equal(output_of(again), output_of(whole.model))
    assert not torch.equal(output_of(again), output_of(model))
    assert uneven_shapes(again) == uneven_shapes(model)


def test_the_best_model_comes_back(tmp_path: Path) -> None:
    model = FAMILIES["bert"]()
    record_shapes(model)
    model.save_pretrained(tmp_path / "start")
    run = trainer(
        reloaded(tmp_path / "start"), tmp_path / "run", eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    run.train()
    assert run.state.best_global_step == 2  # by the highest loss, so that the last model is another one
    assert not torch.equal(output_of(run.model), output_of(reloaded(tmp_path / "run" / "checkpoint-4")))
    best = reloaded(Path(run.state.best_model_checkpoint))
    assert torch.equal(output_of(run.model), output_of(best))


def test_what_is_dense_in_a_packed_model_trains_on(tmp_path: Path) -> None:
    model = FAMILIES["bert"]()
    hfcompress.quantize(model, hfcompress.RTN(bits=8, group_size=None))
    model.save_pretrained(tmp_path / "start")
    run = trainer(reloaded(tmp_path / "start"), tmp_path / "run")
    run.train()
    again = reloaded(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(output_of(again), output_of(run.model))
    assert not torch.equal(output_of(again), output_of(model))
