"""Two processes learn what one learns from the joint batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.distilling import Rows, distiller, equal, llama, token_classifier, token_rows, weights_of
from tests.distributed import WORLD_SIZE, run_in_two_processes
from tests.forks import Forks
from tests.test_distillation_across import STUDENT, TEACHER, models_of, rows

pytestmark = pytest.mark.usefixtures("quick_trainers")


# A relation or a hidden state of rows whose numbers of tokens differ; projections between two widths.
# Classes of tokens, of which the processes have different numbers and whose task loss the model makes as a mean.
# Texts that the student writes and a teacher of another tokenizer scores: sampled so that every draw is the most
# probable token, as two processes draw other numbers than one.
LOSSES: dict[str, dict[str, Any]] = {
    "logits": {},
    "written": {
        "temperature": None,
        "losses": [{"universal_logit": {"top": None}}],
        "on_policy": {"fraction": 1.0, "max_new_tokens": 4, "temperature": 1e-6, "prompt_tokens": 3},
        "processing_class": STUDENT,
        "teacher_processing_class": TEACHER,
    },
    "classes": {},
    "features": {"temperature": None, "losses": ["forward_kl", "hidden_states", "relations"]},
}


def models_for(kind: str) -> tuple[PreTrainedModel, PreTrainedModel, Rows | None]:
    """Return student, teacher and rows."""
    if kind == "written":
        return *models_of(), rows() * 2
    if kind == "classes":
        return token_classifier(), token_classifier(seed=1), token_rows(16)
    return student_for(kind), llama(seed=1), None


def student_for(kind: str) -> PreTrainedModel:
    return llama() if kind == "logits" else llama(hidden_size=16, intermediate_size=32)


def state_of(trainer: Any) -> dict[str, Tensor]:
    return {**weights_of(trainer.model), **{f"projection {k}": v for k, v in weights_of(trainer.projections).items()}}


def logs_of(trainer: Any) -> list[dict[str, float]]:
    names = ("loss", "kd_loss", "task_loss", "hidden_states", "relations")
    return [{k: e[k] for k in names if k in e} for e in trainer.state.log_history if "loss" in e]


def _distil_in_one_process(folder: str, kind: str) -> None:
    student, teacher, data = models_for(kind)
    trainer = distiller(
        student, teacher, Path(folder), data, max_steps=2, per_device_train_batch_size=2,
        ddp_backend="gloo", gradient_accumulation_steps=2, **LOSSES[kind],
    )  # fmt: skip
    initial = state_of(trainer)
    trainer.train()
    moved = {name: value - initial[name] for name, value in weights_of(trainer._student).items()}
    moved |= {f"projection {k}": v - initial[f"projection {k}"] for k, v in weights_of(trainer.projections).items()}
    torch.save((trainer.args.world_size, moved, logs_of(trainer)), Path(folder) / f"{trainer.args.process_index}.pt")


@pytest.mark.distributed
@pytest.mark.parametrize("kind", LOSSES)
def test_two_processes_learn_what_one_learns_from_the_joint_batch(kind: str, tmp_path: Path, forks: Forks) -> None:
    run_in_two_processes(forks, _distil_in_one_process, str(tmp_path), kind)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD_SIZE)]
    assert [size for size, *_ in results] == [WORLD_SIZE] * WORLD_SIZE
    (_, moved, logs), (_, other, _) = results
    assert equal(moved, other)

    student, teacher, data = models_for(kind)
    trainer = distiller(student, teacher, tmp_path, data, max_steps=2, per_device_train_batch_size=8, **LOSSES[kind])
    initial = state_of(trainer)
    trainer.train()
    assert any("projection" in name for name in moved) == (kind == "features")
    for name, value in state_of(trainer).items():
        torch.testing.assert_close(
            moved[name], value - initial[name], rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert max(float(value.abs().max()) for value in moved.values()) > 1e-4
    for entry, expected in zip(logs, logs_of(trainer)):
        assert entry.keys() == expected.keys()
        for term, value in entry.items():
            assert value == pytest.approx(expected[term], rel=1e-4)
