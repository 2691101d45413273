"""Two processes learn what one learns from the joint batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.distilling import (
    distiller,
    equal,
    llama,
    weights_of,
)
from tests.distributed import WORLD_SIZE, run_in_two_processes

pytestmark = pytest.mark.usefixtures("quick_trainers")


# A relation or a hidden state of rows whose numbers of tokens differ; projections between two widths.
LOSSES: dict[str, dict[str, Any]] = {
    "logits": {},
    "features": {"temperature": None, "losses": ["forward_kl", "hidden_states", "relations"]},
}


def student_for(kind: str) -> PreTrainedModel:
    return llama() if kind == "logits" else llama(hidden_size=16, intermediate_size=32)


def state_of(trainer: Any) -> dict[str, Tensor]:
    return {**weights_of(trainer.model), **{f"projection {k}": v for k, v in weights_of(trainer.projections).items()}}


def logs_of(trainer: Any) -> list[dict[str, float]]:
    names = ("loss", "kd_loss", "task_loss", "hidden_states", "relations")
    return [{k: e[k] for k in names if k in e} for e in trainer.state.log_history if "loss" in e]


def _distil_in_one_process(folder: str, kind: str) -> None:
    trainer = distiller(
        student_for(kind), llama(seed=1), Path(folder), max_steps=2, per_device_train_batch_size=2,
        ddp_backend="gloo", gradient_accumulation_steps=2, **LOSSES[kind],
    )  # fmt: skip
    initial = state_of(trainer)
    trainer.train()
    moved = {name: value - initial[name] for name, value in weights_of(trainer._student).items()}
    moved |= {f"projection {k}": v - initial[f"projection {k}"] for k, v in weights_of(trainer.projections).items()}
    torch.save((trainer.args.world_size, moved, logs_of(trainer)), Path(folder) / f"{trainer.args.process_index}.pt")


@pytest.mark.distributed
@pytest.mark.parametrize("kind", LOSSES)
def test_two_processes_learn_what_one_learns_from_the_joint_batch(kind: str, tmp_path: Path) -> None:
    run_in_two_processes(_distil_in_one_process, str(tmp_path), kind)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD_SIZE)]
    assert [size for size, *_ in results] == [WORLD_SIZE] * WORLD_SIZE
    (_, moved, logs), (_, other, _) = results
    assert equal(moved, other)

    trainer = distiller(
        student_for(kind), llama(seed=1), tmp_path, max_steps=2, per_device_train_batch_size=8, **LOSSES[kind]
    )
    initial = state_of(trainer)
    trainer.train()
    assert any("projection" in name for name in moved) == (kind == "features")
    for name, value in state_of(trainer).items():
        torch.testing.assert_close(
            moved[name], value - initial[name], rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
    for entry, expected in zip(logs, logs_of(trainer)):
        assert entry.keys() == expected.keys()
        for term, value in entry.items():
            assert value == pytest.approx(expected[term], rel=1e-4)
