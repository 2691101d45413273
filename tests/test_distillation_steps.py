"""Steps that are out of the ordinary: without a label, with noise on embeddings, checkpointed, and resumed mid-way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hfcompress.outputs import IGNORED
from tests.checkpointing import checkpointing
from tests.distilling import StopAt, distiller, equal, llama, text_rows, weights_of
from tests.kinds import KINDS, Row, pad

pytestmark = pytest.mark.usefixtures("quick_trainers")
# Every row of the others has a label.
CAN_BE_UNLABELLED = [name for name in KINDS if name not in ("yes or no", "numbers", "vector")]


def unlabelled(row: Row) -> Row:
    """Return a row in which no item has a label; an answer that was cut off lies behind the row."""
    if "start_positions" in row:
        return {**row, "start_positions": torch.tensor(999), "end_positions": torch.tensor(999)}
    return {**row, "labels": torch.full_like(row["labels"], IGNORED)}


def counting(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that fills with how many places of each micro-batch are compared."""
    counted: list[int] = []
    count = trainer.counted_in

    def note(batch: Any) -> dict[str, int]:
        found: dict[str, int] = count(batch)
        counted.append(found["places"])
        return found

    monkeypatch.setattr(trainer, "counted_in", note)
    return counted


@pytest.mark.parametrize("name", CAN_BE_UNLABELLED)
def test_a_step_without_any_label_is_finite(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is one of which a whole micro-batch has none."""
    kind = KINDS[name]
    full = kind.rows()
    none = [unlabelled(row) for row in full]
    for rows in (none, [*none[:4], *full[4:]]):
        trainer = distiller(
            kind.make(0), kind.make(1), tmp_path, rows, data_collator=pad, max_steps=2,
            per_device_train_batch_size=4, gradient_accumulation_steps=2, train_sampling_strategy="sequential",
        )  # fmt: skip
        counted = counting(trainer, monkeypatch)
        trainer.train()
        frames = name == "letter of a sound"  # are compared whatever the transcript
        assert [found > 0 for found in counted] == [frames, frames or rows is not none] * 2
        assert all(bool(torch.isfinite(weight).all()) for weight in weights_of(trainer.model).values())
        logged = [value for logs in trainer.state.log_history for value in logs.values() if isinstance(value, float)]
        assert all(math.isfinite(value) for value in logged)


def test_noise_on_embeddings_is_the_students_alone(tmp_path: Path) -> None:
    """NEFTune changes what the student reads; what the teacher answers stays the same."""
    teacher = llama(1)
    before = weights_of(teacher)
    first = []
    for noise in (None, 5.0):
        trainer = distiller(
            llama(0), teacher, tmp_path, text_rows(), neftune_noise_alpha=noise, temperature=None,
            losses=["forward_kl", "hidden_states", "embeddings"],
        )  # fmt: skip
        trainer.train()
        first.append(trainer.state.log_history[0])
    assert first[0]["embeddings"] != first[1]["embeddings"]
    assert first[0]["forward_kl"] != first[1]["forward_kl"]
    assert equal(before, weights_of(teacher))
    assert not any(module._forward_hooks for module in teacher.modules())


@pytest.mark.parametrize("loss", ["relations", "feed_forward", "hidden_states"])
@pytest.mark.parametrize("name", ["token of a text", "token of a speech"])
def test_checkpointed_encoder_decoders_learn_the_same_from_features(name: str, loss: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    trained = []
    for wanted in (False, True):
        trainer = distiller(
            kind.make(0), kind.make(1), tmp_path, kind.rows(), data_collator=pad, temperature=None, max_steps=2,
            losses=[loss, "forward_kl"], **checkpointing(wanted, use_reentrant=False),
        )  # fmt: skip
        trainer.train()
        trained.append(weights_of(trainer.model))
    for one, weight in trained[0].items():
        torch.testing.assert_close(trained[1][one], weight, rtol=1e-4, atol=1e-5)


def test_weights_on_their_line_go_on_where_a_run_was_stopped(tmp_path: Path) -> None:
    options = {
        "losses": [
            {"forward_kl": {"weight": 1.0, "final_weight": 0.0}},
            {"hidden_states": {"weight": 0.5, "final_weight": 2.0}},
        ],
        "temperature": None,
        "max_steps": 6,
        "learning_rate": 0.01,
    }
    whole = distiller(llama(0), llama(1), tmp_path / "whole", text_rows(), **options)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    stopped = distiller(
        llama(0), llama(1), tmp_path / "parts", text_rows(), callbacks=[StopAt(3)], **saving, **options
    )
    stopped.train()
    resumed = distiller(llama(0), llama(1), tmp_path / "parts", text_rows(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights_of(whole.model), weights_of(resumed.model))
    assert not equal(weights_of(whole.model), weights_of(stopped.model))
