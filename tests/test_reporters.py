"""What ``report_to`` names gets sparsity, losses and pictures, at the steps where they were measured."""

from __future__ import annotations

import importlib
import inspect
import io
import struct
import sys
from collections.abc import Iterator
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
from hfcompress.pipeline import compress
from hfcompress.publish.reporters import draw_losses_over_steps
from tests.conftest import tiny_llama, token_batches
from tests.runs import language_recipe, write_text

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


def distilling(arguments: dict[str, Any], **given: Any) -> hfcompress.DistillationTrainer:
    return hfcompress.DistillationTrainer(
        model=tiny_llama(), teacher_model=tiny_llama(seed=2), train_dataset=ROWS, eval_dataset=ROWS[:4],
        args=hfcompress.DistillationConfig(**arguments), **given,
    )  # fmt: skip


class FakeTrackio(ModuleType):
    """What the Trainer and our pictures use of trackio, with its signatures and refusals; ``logged`` has what came."""

    __version__ = "0.43.0"

    def __init__(self) -> None:
        super().__init__("trackio")
        self.logged: list[dict[str, Any]] = []
        self.running = False
        self.config = MagicMock()
        none = SimpleNamespace(get=lambda: None)
        self.context_vars = SimpleNamespace(current_space_id=none, current_project=none)

    def init(
        self, project: str, name: str | None = None, group: str | None = None, space_id: str | None = None,
        server_url: str | None = None, dataset_id: str | None = None, bucket_id: str | None = None,
        config: dict[str, Any] | None = None, resume: str = "never", settings: Any = None, private: bool | None = None,
        embed: bool = True, auto_log_gpu: bool | None = None, gpu_log_interval: float = 10.0,
        auto_log_cpu: bool | None = None, cpu_log_interval: float = 10.0, webhook_url: str | None = None,
        webhook_min_level: Any = None,
    ) -> None:  # fmt: skip
        self.running = True

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if not self.running:
            raise RuntimeError("Call trackio.init() before trackio.log().")
        self.logged.append(metrics)

    def finish(self) -> None:
        if not self.running:
            raise RuntimeError("Call trackio.init() before trackio.finish().")
        self.running = False

    class Image:
        def __init__(self, value: Any, caption: str | None = None) -> None:
            if isinstance(value, np.ndarray) and value.dtype != np.uint8:
                raise ValueError(f"Invalid value dtype, expected np.uint8, got {value.dtype}")
            self.value, self.caption = value, caption


def fake_trackio(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put a module in trackio's place; return the list that everything logged goes to."""
    trackio = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: True)
    return trackio.logged


@pytest.fixture(scope="module")
def real_trackio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return trackio itself, which keeps its database where the environment says when it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        module = importlib.import_module("trackio")
        assert Path(module.utils.TRACKIO_DIR) == folder
        yield module


def kept_by(trackio: Any, project: str) -> list[dict[str, Any]]:
    """Return what trackio's database holds of the one run of a project, in order."""
    (run,) = trackio.Api().runs(project)
    return trackio.SQLiteStorage.get_logs(project, run.name, run_id=run.id)


@pytest.mark.parametrize("evaluating", ["steps", "no"])
def test_tensorboard_has_sparsity_losses_and_pictures(evaluating: str, tmp_path: Path) -> None:
    """Without an evaluation, sparsity and pictures come once, with the end."""
    pruning = hfcompress.PruneCallback(sparsity=0.5, start=0.0, end=0.75)
    trainer = distilling({**options(tmp_path, "tensorboard"), "eval_strategy": evaluating}, callbacks=[pruning])
    trainer.train()
    found = events(tmp_path)
    scalars = {(value.tag, step): value.simple_value for step, value in found if value.HasField("simple_value")}
    history = trainer.state.log_history
    steps = [2, 4] if evaluating == "steps" else [4]
    counted = [logs for logs in history if "sparsity" in logs]
    assert [logs["step"] for logs in counted] == steps
    for step, logs in zip(steps, counted):
        layers = [name for name in logs if name.startswith("sparsity/")]
        assert len(layers) == 2
        for name in ["sparsity", *layers]:
            assert scalars[f"train/{name}", step] == pytest.approx(logs[name])
        if evaluating == "steps":
            assert scalars["eval/loss", step] == pytest.approx(logs["eval_loss"])
    trained = [logs for logs in history if "kd_loss" in logs]
    assert len(trained) == 4
    for logs in trained:
        for name in ("kd_loss", "task_loss"):
            assert scalars[f"train/{name}", logs["step"]] == pytest.approx(logs[name])
    pictures = pictures_of(found)
    names = ("distillation_losses", "sparsity_of_each_layer")
    assert {(step, name) for step, name, _ in pictures} == {(step, name) for step in steps for name in names}
    assert len(pictures) == len(steps) * len(names)
    for *_, picture in pictures:
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50  # a picture, and not one colour


@pytest.mark.usefixtures("forked")
def test_what_a_recipe_sends_to_tensorboard_stays(tmp_path: Path, llama_dir: Path) -> None:
    """The folder in which a stage trains is gone when the stage is done."""
    training = {"report_to": "tensorboard", "logging_steps": 1, "per_device_train_batch_size": 4}
    recipe = language_recipe(
        llama_dir, write_text(tmp_path / "text.jsonl"), tmp_path / "out", evaluate={"max_rows": 2},
        stages=[{"distill": {"steps": 2, "prune": {"sparsity": 0.5}, "training": training}}, {"shrink": {}}],
    )  # fmt: skip
    compress(recipe)
    found = events(tmp_path / "out.tensorboard" / "distill")
    assert {step for step, value in found if value.tag == "train/kd_loss"} == {1, 2}
    assert {name for _, name, _ in pictures_of(found)} == {"distillation_losses", "sparsity_of_each_layer"}
    assert not (tmp_path / "out.partial").exists()


def pictures_of(found: list[tuple[int, Any]]) -> list[tuple[int, str, Any]]:
    """Return (step, name, pixels) of every picture among events."""
    return [(step, value.tag, np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)).convert("RGB")))
            for step, value in found if value.HasField("image")]  # fmt: skip


@pytest.mark.parametrize("evaluating", ["steps", "no"])
def test_tensorboard_has_every_term_of_a_distillation_and_their_picture(evaluating: str, tmp_path: Path) -> None:
    """Without a pruning callback; and without an evaluation the picture comes with the end."""
    given = {
        **options(tmp_path, "tensorboard"),
        "eval_strategy": evaluating,
        "losses": ["forward_kl", "hidden_states"],
    }
    trainer = distilling(given)
    trainer.train()
    found = events(tmp_path)
    scalars = {(value.tag, step): value.simple_value for step, value in found if value.HasField("simple_value")}
    trained = [logs for logs in trainer.state.log_history if "kd_loss" in logs]
    assert len(trained) == 4
    for logs in trained:
        for name in ("kd_loss", "task_loss", "forward_kl", "hidden_states"):
            assert scalars[f"train/{name}", logs["step"]] == pytest.approx(logs[name])
    expected = [2, 4] if evaluating == "steps" else [4]
    assert [(step, name) for step, name, _ in pictures_of(found)] == [
        (step, "distillation_losses") for step in expected
    ]


def test_the_picture_of_losses_shows_each_term_at_its_steps_and_evaluations_beside_the_task_loss() -> None:
    history = [
        {"loss": 3.0, "kd_loss": 2.0, "task_loss": 4.0, "step": 5},
        {"loss": 2.0, "kd_loss": 1.0, "task_loss": 3.5, "step": 10},
        {"eval_loss": 3.75, "step": 10},
        {"loss": 1.0, "kd_loss": 0.5, "step": 15},  # the student wrote its texts, which have no task loss
    ]
    drawn = {
        axes.get_title(loc="left"): [line.get_xydata().tolist() for line in axes.get_lines()]
        for axes in draw_losses_over_steps(history, ["loss", "kd_loss", "task_loss"]).axes
    }
    assert drawn == {
        "loss": [[[5, 3], [10, 2], [15, 1]]],
        "kd loss": [[[5, 2], [10, 1], [15, 0.5]]],
        "task loss": [[[5, 4], [10, 3.5]], [[10, 3.75]]],
    }


def test_trackio_has_sparsity_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = fake_trackio(monkeypatch)
    args = TrainingArguments(**options(tmp_path, "trackio"))
    callbacks = [hfcompress.HeadPruneCallback(sparsity=0.5, end=0.75), hfcompress.PruneCallback(sparsity=0.25)]
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=callbacks)
    trainer.train()
    pictures = {(name, logs["train/global_step"]): value for logs in logged for name, value in logs.items()
                if isinstance(value, FakeTrackio.Image)}  # fmt: skip
    names = [name for name, step in pictures if step == 4]
    assert len(names) == 2
    assert "sparsity_of_each_layer" in names
    for (_, step), picture in pictures.items():
        assert picture.caption == f"step {step}"
        assert picture.value.shape[2] == 3
    history = [logs for logs in trainer.state.log_history if "eval_loss" in logs]
    sent = [logs["train/sparsity"] for logs in logged if "train/sparsity" in logs]
    assert sent == [logs["sparsity"] for logs in history]


def test_a_last_step_without_an_evaluation_is_logged_for_each_callback(tmp_path: Path) -> None:
    callbacks = [hfcompress.PruneCallback(sparsity=0.5, targets=[f"*.{name}"]) for name in ("q_proj", "k_proj")]
    args = TrainingArguments(**{**options(tmp_path, "none"), "eval_steps": 3})
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=callbacks)
    trainer.train()
    for name in ("sparsity_1", "sparsity_2"):
        assert [logs["step"] for logs in trainer.state.log_history if name in logs] == [3, 4]


def test_trackio_has_both_losses_of_a_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = fake_trackio(monkeypatch)
    trainer = distilling(options(tmp_path, "trackio"))
    trainer.train()
    expected = [logs for logs in trainer.state.log_history if "kd_loss" in logs]
    for name in ("kd_loss", "task_loss"):
        sent = [logs[f"train/{name}"] for logs in logged if f"train/{name}" in logs]
        assert sent == [logs[name] for logs in expected]
        assert len(sent) == 4
    pictures = [logs for logs in logged if "distillation_losses" in logs]
    assert [(logs["train/global_step"], logs["distillation_losses"].caption) for logs in pictures] == [
        (2, "step 2"),
        (4, "step 4"),
    ]


@pytest.mark.parametrize("name", ["init", "log", "finish", "Image"])
def test_the_fake_of_trackio_takes_what_trackio_takes(name: str, real_trackio: Any) -> None:
    def taken(module: Any) -> list[tuple[str, Any, Any]]:
        return [
            (one.name, one.kind, one.default) for one in inspect.signature(getattr(module, name)).parameters.values()
        ]

    assert taken(FakeTrackio()) == taken(real_trackio)


def test_trackio_itself_keeps_losses_sparsity_and_pictures(tmp_path: Path, real_trackio: Any) -> None:
    """What lies in its database, and in its folder of pictures, after a run that distils and prunes."""
    pruning = hfcompress.PruneCallback(sparsity=0.5, start=0.0, end=0.75)
    arguments = {**options(tmp_path, "trackio"), "project": "distilled-and-pruned"}
    trainer = distilling(arguments, callbacks=[pruning])
    trainer.train()
    kept = kept_by(real_trackio, arguments["project"])
    history = trainer.state.log_history
    for name, among in {"kd_loss": 4, "task_loss": 4, "sparsity": 2, "sparsity/model.layers.1": 2}.items():
        sent = {logs["train/global_step"]: logs[f"train/{name}"] for logs in kept if f"train/{name}" in logs}
        assert sent == {logs["step"]: pytest.approx(logs[name]) for logs in history if name in logs}
        assert len(sent) == among
    pictures = [(name, logs["train/global_step"], value) for logs in kept for name, value in logs.items()
                if isinstance(value, dict)]  # fmt: skip
    names = ("distillation_losses", "sparsity_of_each_layer")
    assert [(name, step) for name, step, _ in pictures] == [(name, step) for step in (2, 4) for name in names]
    for _, step, value in pictures:
        assert (value["_type"], value["caption"]) == ("trackio.image", f"step {step}")
        file = real_trackio.utils.MEDIA_DIR / value["file_path"]
        assert len(np.unique(np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_nothing_is_drawn_when_nobody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfcompress.publish.reporters.pixels_of", lambda _: pytest.fail("drawn for nobody"))
    trainer = Trainer(model=tiny_llama(), args=TrainingArguments(**options(tmp_path, "none")), train_dataset=ROWS,
                      eval_dataset=ROWS[:4], callbacks=[hfcompress.PruneCallback])  # fmt: skip
    trainer.train()
    assert trainer.model.model_tags == ["hfcompress", "pruned"]


class Screen(ModuleType):
    """Stands for ``IPython.display``: what is shown, in places that are updated."""

    def __init__(self) -> None:
        super().__init__("IPython.display")
        self.places: list[list[Any]] = []  # what each place showed, one after the other

    class HTML:
        def __init__(self, data: str) -> None:
            self.data = data

    class Image(HTML):
        def __init__(self, data: bytes) -> None:
            assert data.startswith(b"\x89PNG")
            self.data = data

    def display(self, thing: Any, *, display_id: bool | None = None) -> Any:
        place = [thing]
        self.places.append(place)
        return SimpleNamespace(update=place.append) if display_id else None


def notebook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the Trainer's callback for notebooks, which keeps its table and its screen, without a notebook."""
    ipython, screen = ModuleType("IPython"), Screen()
    ipython.display = screen  # type: ignore[attr-defined]
    ipython.version_info = (9, 0)  # type: ignore[attr-defined]  # which matplotlib asks for
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", screen)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    from transformers.utils.notebook import NotebookProgressCallback

    class Kept(NotebookProgressCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.table = self.training_tracker.inner_table
            super().on_train_end(*args, **kwargs)

    kept = Kept()
    kept.screen = screen
    return kept


def test_a_notebooks_table_has_both_losses_of_a_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = notebook(monkeypatch)
    trainer = distilling(options(tmp_path, "none"), callbacks=[shown])
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


def test_a_notebooks_table_has_every_term_also_without_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = notebook(monkeypatch)
    arguments = {**options(tmp_path, "none"), "eval_strategy": "no", "losses": ["forward_kl", "hidden_states"]}
    trainer = distilling(arguments, callbacks=[shown])
    trainer.train()
    columns, *lines = shown.table
    logged = [logs for logs in trainer.state.log_history if "kd_loss" in logs]
    assert [line[0] for line in lines] == [1, 2, 3, 4]
    for line, logs in zip(lines, logged):
        row = dict(zip(columns, line))
        assert row["Training Loss"] == logs["loss"]
        for column, name in {"Kd loss": "kd_loss", "Task loss": "task_loss", "Forward kl": "forward_kl",
                             "Hidden states": "hidden_states"}.items():  # fmt: skip
            assert row[column] == f"{logs[name]:.4f}"


def test_a_notebook_shows_the_pictures_and_each_takes_the_place_of_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = notebook(monkeypatch)
    trainer = distilling(options(tmp_path, "none"), callbacks=[hfcompress.PruneCallback(sparsity=0.5), shown])
    trainer.train()
    pictures = [place for place in shown.screen.places if isinstance(place[0], Screen.Image)]
    assert [len(place) for place in pictures] == [2, 2]  # losses and sparsity, at two evaluations
    decoded = [np.asarray(Image.open(io.BytesIO(place[-1].data)).convert("RGB")) for place in pictures]
    assert all(len(np.unique(one.reshape(-1, 3), axis=0)) > 50 for one in decoded)
    assert all(first.data != last.data for first, last in pictures)


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
