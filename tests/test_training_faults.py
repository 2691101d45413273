"""Arguments of a stage's training that its Trainer or its task cannot work with are known before the first stage."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers

from hfcompress import checks
from hfcompress.checks import check_before_work
from hfcompress.errors import RecipeError
from hfcompress.job import Source
from tests.tiny_tasks import TINY

pytestmark = pytest.mark.usefixtures("quick_trainers")

WITH_CLASSES = set(TINY) - {"multi-label", "regression", "question-answering", "speech-ctc", "sentence-embeddings"}
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}
FAULTS: list[tuple[str, str, dict[str, Any], dict[str, Any], str]] = [
    ("multi-label", "finetune", {"label_smoothing_factor": 0.1}, {},
     "label_smoothing_factor needs a loss of classes, but the answers of sequence-classification are decisions"),
    ("regression", "finetune", {"label_smoothing_factor": 0.1}, {}, "sequence-classification are numbers"),
    ("causal-lm", "finetune", {"use_liger_kernel": True}, {}, "pip install liger-kernel"),
    ("causal-lm", "finetune", {"optim": "adamw_torch_4bit"}, {}, "torchao"),
    ("causal-lm", "finetune", {"report_to": "wand"}, {}, "wand is not supported, only"),
    ("causal-lm", "finetune", {"report_to": "wandb"}, {}, "requires wandb to be installed"),
    ("causal-lm", "finetune", {"lr_scheduler_type": "cosine_with_min_lr"}, {}, "min_lr"),
    ("causal-lm", "finetune", {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"cycles": 2}}, {}, "cycles"),
    ("causal-lm", "distill", {"torch_compile": True}, {"losses": ["hidden_states"]},
     "torch_compile does not run the hooks"),
    ("causal-lm", "distill",
     {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
     {"losses": ["relations"]}, "Reentrant checkpointing cuts"),
    ("single-label", "distill", {**EVERY_STEP, "metric_for_best_model": "accuracy"}, {},
     "there is no 'accuracy' to choose by; a stage evaluates the task loss alone: use metric_for_best_model: loss"),
    ("sentence-embeddings", "distill", {**EVERY_STEP, "save_steps": 1, "load_best_model_at_end": True}, {},
     "there is no 'loss' to choose by; a stage evaluates no loss, as there are no labels"),
    ("image-classification", "finetune", {"train_sampling_strategy": "group_by_length"}, {},
     "train_sampling_strategy: the rows of image-classification have no tokens"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "stage", "training", "options", "message"), FAULTS, ids=[f"{one[0]}-{'-'.join(one[2])}" for one in FAULTS]
)
def test_it_is_refused_before_the_first_stage(
    name: str, stage: str, training: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(checks, "check_teachers", lambda *_: None)
    monkeypatch.setattr("hfcompress.opening.open_model", None)
    stages = [{stage: {"steps": 1, "training": training, **options}}]
    with pytest.raises(RecipeError, match=f"The training options of stage '{stage}' .*({message})"):
        check_before_work(Source(TINY[name].recipe(tmp_path, stages=stages)))
    assert not list(Path.cwd().glob("unused*"))


def test_a_class_without_checkpointing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"activation_checkpointing": True}
    recipe = TINY["masked-lm"].recipe(tmp_path, stages=[{"finetune": {"steps": 1, "training": training}}])
    check_before_work(Source(recipe))
    monkeypatch.setattr(transformers.BertForMaskedLM, "supports_gradient_checkpointing", False)
    with pytest.raises(RecipeError, match="activation_checkpointing is not for a BertForMaskedLM"):
        check_before_work(Source(recipe))


@pytest.mark.parametrize("name", [name for name in TINY if name != "sentence-embeddings"])
def test_what_works_is_not_refused(name: str, tmp_path: Path) -> None:
    training = {
        **EVERY_STEP, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "optim": "adafactor",
        "report_to": "tensorboard", "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "activation_checkpointing": True, "push_to_hub": True, "warmup_steps": 0.1,
        "label_smoothing_factor": 0.1 if name in WITH_CLASSES else 0.0,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_before_work(
            Source(TINY[name].recipe(tmp_path, stages=[{"finetune": {"steps": 1, "training": training}}]))
        )
