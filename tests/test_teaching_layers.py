"""Layers that losses of features compare: counted before a recipe's first stage, from configs alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hfcompress.distillation.losses import LOSSES, FeatureLoss, named, read_losses
from hfcompress.distillation.matching import FeatureMatcher
from hfcompress.errors import ModelError
from hfcompress.job import Source
from hfcompress.teaching import check_teachers
from tests.test_distillation_edges import distilled, refused_by_recipe
from tests.tiny_tasks import TINY


@pytest.mark.parametrize(
    ("loss", "layers", "teacher", "there"),
    [
        ("hidden_states", [[0, 4]], "original", (0, 3)),
        ("relations", [[0, 4]], "original", (0, 3)),
        ("feed_forward", [[1, 1]], "original", (0, 3)),
        ("hidden_states", [[1, 1]], "original", (0, 3)),
        ("hidden_states", [[0, 1]], "drop_layers", (0, 0)),
        ("relations", [[0, 1]], "drop_layers", (0, 0)),
        ("sentence_embedding", [[0, 1]], "original", (0, 0)),
    ],
)
def test_layers_that_are_not_there_are_refused_before_the_first_stage(
    loss: str, layers: Any, teacher: str, there: tuple[int, int], tmp_path: Path
) -> None:
    drop = {"drop_layers": {"keep": 1, "select": "loss"}}
    stages = [drop, {"distill": {"steps": 1, "teacher": teacher, "losses": [{loss: {"layers": layers}}]}}]
    source = Source(TINY["causal-lm"].recipe(tmp_path, stages))
    said = "[{}, {}] names a layer that is not there: the student has layers 0 to {}, the teacher 0 to {}."
    refused_by_recipe(source, re.escape(said.format(*layers[0], *there)))


def test_layers_of_a_model_from_outside_are_counted_before_the_first_stage(tmp_path: Path) -> None:
    teacher = TINY["causal-lm"].write(tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "layer_types": None}))
    source = distilled(tmp_path, "causal-lm", teacher=str(teacher), losses=["hidden_states"])
    refused_by_recipe(source, "the student's 4 layers over the teacher's, which has only 1")


@pytest.mark.parametrize("loss", [name for name, kind in LOSSES.items() if issubclass(kind, FeatureLoss)])
@pytest.mark.parametrize("task", TINY)
def test_models_without_weights_show_whether_layers_can_be_compared(task: str, loss: str, tmp_path: Path) -> None:
    source = distilled(tmp_path, task, losses=[loss])
    student, teacher = source.open_original(), source.open_original()
    try:
        FeatureMatcher(named(read_losses([loss])), student, teacher, seed=0)  # type: ignore[arg-type]
    except ModelError as error:
        refused_by_recipe(source, re.escape(str(error)))
    else:
        check_teachers(source, source.recipe.stages[-1])
