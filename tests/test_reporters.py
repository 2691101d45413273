"""What ``report_to`` names gets sparsity, losses and pictures, at the steps where they were measured."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from transformers import Trainer, TrainingArguments
from transformers.integrations import integration_utils

import hfcompress
from tests.conftest import tiny_llama, token_batches

pytestmark = pytest.mark.usefixtures("quick_trainers")
ROWS = [{name: value[0] for name, value in batch.items()} for batch in token_batches(8, rows=1)]


def options(folder: Path, report_to: str) -> dict[str, Any]:
    return {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 4,
            "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "report_to": report_to}  # fmt: skip


def events(folder: Path) -> list[tuple[int, Any]]:
    """Return (step, value) of every event in a folder's files: length, checksum, content, checksum, and again."""
    found = []
    for file in sorted(folder.rglob("events.out.*")):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            found += [(event.step, value) for value in event.summary.value]
            at += 12 + length + 4
    return found


def distilling(folder: Path, report_to: str, **given: Any) -> hfcompress.DistillationTrainer:
    return hfcompress.DistillationTrainer(
        model=tiny_llama(), teacher_model=tiny_llama(seed=2), train_dataset=ROWS, eval_dataset=ROWS[:4],
        args=hfcompress.DistillationConfig(**options(folder, report_to)), **given,
    )  # fmt: skip


def fake_trackio(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put a module in trackio's place; return the list that everything logged goes to."""
    logged: list[dict[str, Any]] = []
    trackio = ModuleType("trackio")
    none = SimpleNamespace(get=lambda: None)
    vars(trackio).update(
        __version__="0.43.0", init=lambda **_: None, finish=lambda: None, log=logged.append, config=MagicMock(),
        Image=lambda value, caption: ("picture", value, caption),
        context_vars=SimpleNamespace(current_space_id=none, current_project=none),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: True)
    return logged


def test_tensorboard_has_sparsity_losses_and_pictures(tmp_path: Path) -> None:
    pruning = hfcompress.PruneCallback(sparsity=0.5, start=0.0, end=0.75)
    trainer = distilling(tmp_path, "tensorboard", callbacks=[pruning])
    trainer.train()
    found = events(tmp_path)
    scalars = {(value.tag, step): value.simple_value for step, value in found if value.HasField("simple_value")}
    history = trainer.state.log_history
    evaluated = {logs["step"]: logs for logs in history if "eval_loss" in logs}
    assert set(evaluated) == {2, 4}
    for step, logs in evaluated.items():
        layers = [name for name in logs if name.startswith("sparsity/")]
        assert len(layers) == 2
        for name in ["sparsity", *layers]:
            assert scalars[f"train/{name}", step] == pytest.approx(logs[name])
        assert scalars["eval/loss", step] == pytest.approx(logs["eval_loss"])
    trained = [logs for logs in history if "kd_loss" in logs]
    assert len(trained) == 4
    for logs in trained:
        for name in ("kd_loss", "task_loss"):
            assert scalars[f"train/{name}", logs["step"]] == pytest.approx(logs[name])
    pictures = [(step, value) for step, value in found if value.HasField("image")]
    assert [(step, value.tag) for step, value in pictures] == [
        (2, "sparsity_of_each_layer"),
        (4, "sparsity_of_each_layer"),
    ]
    last = np.asarray(Image.open(io.BytesIO(pictures[-1][1].image.encoded_image_string)).convert("RGB"))
    assert len(np.unique(last.reshape(-1, 3), axis=0)) > 50  # a picture, and not one colour


def test_trackio_has_sparsity_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = fake_trackio(monkeypatch)
    args = TrainingArguments(**options(tmp_path, "trackio"))
    callbacks = [hfcompress.HeadPruneCallback(sparsity=0.5, end=0.75), hfcompress.PruneCallback(sparsity=0.25)]
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=callbacks)
    trainer.train()
    pictures = {(name, logs["train/global_step"]): value for logs in logged for name, value in logs.items()
                if isinstance(value, tuple)}  # fmt: skip
    names = [name for name, step in pictures if step == 4]
    assert len(names) == 2
    assert "sparsity_of_each_layer" in names
    for (_, step), (_, pixels, caption) in pictures.items():
        assert caption == f"step {step}"
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
    history = [logs for logs in trainer.state.log_history if "eval_loss" in logs]
    sent = [logs["train/sparsity"] for logs in logged if "train/sparsity" in logs]
    assert sent == [logs["sparsity"] for logs in history]


def test_trackio_has_both_losses_of_a_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = fake_trackio(monkeypatch)
    trainer = distilling(tmp_path, "trackio")
    trainer.train()
    expected = [logs for logs in trainer.state.log_history if "kd_loss" in logs]
    for name in ("kd_loss", "task_loss"):
        sent = [logs[f"train/{name}"] for logs in logged if f"train/{name}" in logs]
        assert sent == [logs[name] for logs in expected]
        assert len(sent) == 4


def test_nothing_is_drawn_when_nobody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfcompress.publish.reporters.pixels_of", lambda _: pytest.fail("drawn for nobody"))
    trainer = Trainer(model=tiny_llama(), args=TrainingArguments(**options(tmp_path, "none")), train_dataset=ROWS,
                      eval_dataset=ROWS[:4], callbacks=[hfcompress.PruneCallback])  # fmt: skip
    trainer.train()
    assert trainer.model.model_tags == ["hfcompress", "pruned"]


def notebook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the Trainer's callback for notebooks, which keeps its table, where there is no notebook."""
    ipython, display = ModuleType("IPython"), MagicMock()
    ipython.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    from transformers.utils.notebook import NotebookProgressCallback

    class Kept(NotebookProgressCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.table = self.training_tracker.inner_table
            super().on_train_end(*args, **kwargs)

    return Kept()


def test_a_notebooks_table_has_both_losses_of_a_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = notebook(monkeypatch)
    trainer = distilling(tmp_path, "none", callbacks=[shown])
    trainer.train()
    columns, *lines = shown.table
    logged = {logs["step"]: logs for logs in trainer.state.log_history if "kd_loss" in logs}
    assert [line[0] for line in lines] == [2, 4]
    for line in lines:
        row = dict(zip(columns, line))
        assert (row["Kd loss"], row["Task loss"]) == tuple(
            f"{logged[line[0]][n]:.4f}" for n in ("kd_loss", "task_loss")
        )
        assert row["Validation Loss"] > 0


@pytest.mark.parametrize("by", ["steps", "epoch"])
def test_a_notebooks_table_has_the_sparsity(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {**options(tmp_path, "none"), "eval_strategy": by, **({"num_train_epochs": 4} if by == "epoch" else {})}
    callbacks = [hfcompress.PruneCallback(sparsity=0.5, end=0.75), notebook(monkeypatch)]
    trainer = Trainer(model=tiny_llama(), args=TrainingArguments(**given), train_dataset=ROWS,
                      eval_dataset=ROWS[:4], callbacks=callbacks)  # fmt: skip
    trainer.train()
    columns, *lines = callbacks[1].table
    assert {"Training Loss", "Validation Loss", "Sparsity"} <= set(columns)
    evaluated = [logs for logs in trainer.state.log_history if "eval_loss" in logs]
    assert len(lines) == len(evaluated) > 1
    for line, logs in zip(lines, evaluated):
        shown = dict(zip(columns, line))
        assert shown["Sparsity"] == f"{logs['sparsity']:.4f}"
        assert shown["Validation Loss"] == pytest.approx(logs["eval_loss"])
        assert shown[columns[0]] == (logs["epoch"] if by == "epoch" else logs["step"])
