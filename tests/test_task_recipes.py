"""Every task is measured, trained, distilled while pruned, quantized, reloaded and documented by a recipe."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from hfcompress.checkpoint import inspect_checkpoint
from hfcompress.evaluate import METRICS
from hfcompress.job import Source
from hfcompress.outputs import outputs_of
from hfcompress.publish.loading import TASK_PAGES
from hfcompress.tasks import TASKS
from tests.here import compress_here, stages_of
from tests.tiny_tasks import TINY


def test_every_task_is_here() -> None:
    assert {one.task for one in TINY.values()} == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_a_card_of_every_task_knows_its_classes(name: str) -> None:
    task, page = TASKS[name], TASK_PAGES[name]
    assert (page.auto_class, page.processor) == (task.auto_class, task.auto_processor)


@pytest.mark.parametrize("name", TINY)
def test_a_reader_reads_what_the_task_says(name: str, tmp_path: Path) -> None:
    source = Source(TINY[name].recipe(tmp_path))
    model = source.open_original()
    reader = source.task.reader(source.held_out()[1])
    forms = reader.forms(reader.kind or outputs_of(model))
    assert forms == source.task.forms(source.head)
    fitting = {one for one, metric in METRICS.items() if set(metric.takes) & set(forms)}
    assert set(source.metrics) <= fitting


@pytest.mark.usefixtures("quick_trainers", "unpainted")
@pytest.mark.parametrize("name", TINY)
def test_a_task_from_beginning_to_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TINY[name]
    recipe = tiny.recipe(tmp_path)
    folder = compress_here(recipe, monkeypatch)
    stages = stages_of(folder)
    metrics = Source(recipe).metrics
    assert [stage["name"] for stage in stages] == ["original", *(stage.name for stage in recipe.stages)]
    for stage in stages[0 if not Source(recipe).head_is_new else 1 :]:
        found = stage["measurement"]["metrics"]
        assert set(found) == set(metrics)
        assert all(math.isfinite(float(value)) for value in found.values()), found
    layers = inspect_checkpoint(folder).layers
    share = 1 - sum(layer.nonzero for layer in layers) / sum(layer.parameters for layer in layers)
    assert share > 0.35, "half of the linear weights of the layers are pruned"
    card = (folder / "README.md").read_text()
    assert all(metric in card for metric in metrics)
    names = run_card(card, tmp_path, monkeypatch)
    assert type(names["model"]).__name__ == trained_class(folder)


def run_card(card: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the card's Python as a reader does, beside the checkpoint's folder, and return its names."""
    monkeypatch.chdir(folder)
    block = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert block
    names: dict[str, Any] = {}
    exec(block[1].replace('"tiny"', '"out"'), names)
    return names


def trained_class(folder: Path) -> str:
    """Return the class that was trained and saved: with the task's head."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return str(name)
