"""A result on a benchmark that is registered on the Hub is written where the Hub looks for it, and only a true one."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from hfcompress.errors import RecipeError
from hfcompress.gathering import benchmark_entry
from hfcompress.recipe import parse_recipe
from tests.here import compress_here, stages_of
from tests.test_publish import measurements
from tests.tiny_tasks import TINY, reviews

RECIPE: dict[str, Any] = {
    "name": "n", "task": "sequence-classification", "model": {"id": "a/b"},
    "data": {"id": "nyu-mll/glue", "name": "sst2", "splits": {"held_out": "validation"}},
    "evaluate": {"metrics": ["accuracy", "f1"], "benchmark": {"id": "nyu-mll/glue", "task": "sst2"}},
    "stages": [{"finetune": {"steps": 1}}],
}  # fmt: skip


def facts(**metrics: float) -> dict[str, Any]:
    found: dict[str, Any] = copy.deepcopy(measurements())
    found["stages"][-1]["measurement"]["metrics"] = metrics
    return found


@pytest.mark.parametrize(("named", "value"), [(None, 0.91), ("f1", 0.92)])
def test_the_hub_reads_the_value_of_the_reloaded_checkpoint(named: str | None, value: float) -> None:
    raw = copy.deepcopy(RECIPE)
    raw["evaluate"]["benchmark"]["metric"] = named
    measured = facts(accuracy=0.91, f1=0.92)
    (entry,) = parse_eval_result_entries(yaml.safe_load(benchmark_entry(parse_recipe(raw), measured) or ""))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("nyu-mll/glue", "sst2", value)
    assert str(entry.date) == measured["created"]
    assert (entry.notes or "").startswith(f"{named or 'accuracy'}, measured by hfcompress")


def test_a_run_writes_the_file_where_the_hub_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(folder: Path) -> dict[str, Any]:
        (folder / "data").mkdir(exist_ok=True)
        rows = Path(reviews(folder)["files"])
        for split in ("train", "validation"):
            shutil.copy(rows, folder / "data" / f"{split}.jsonl")
        return {"id": str(folder / "data"), "max_length": 16, "splits": {"held_out": "validation"}}

    evaluate = {"metrics": ["accuracy"], "benchmark": {"id": "nyu-mll/glue", "task": "sst2"}}
    tiny = dataclasses.replace(TINY["single-label"], data=named, evaluate=evaluate)
    folder = compress_here(tiny.recipe(tmp_path, [{"quantize": {"method": "rtn", "bits": 8}}]), monkeypatch)
    (entry,) = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results" / "hfcompress.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id) == ("nyu-mll/glue", "sst2")
    assert entry.value == stages_of(folder)[-1]["measurement"]["metrics"]["accuracy"]


def test_without_a_benchmark_or_a_number_nothing_is_written() -> None:
    plain = copy.deepcopy(RECIPE)
    del plain["evaluate"]["benchmark"]
    assert benchmark_entry(parse_recipe(plain), facts(accuracy=0.91)) is None
    assert benchmark_entry(parse_recipe(RECIPE), facts(accuracy=math.inf)) is None


@pytest.mark.parametrize(
    ("section", "values", "fault"),
    [
        ("data", {"files": "mine.tsv"}, r"evaluate\.benchmark: needs data\.id and data\.splits\.held_out"),
        ("data", {"id": "nyu-mll/glue"}, r"evaluate\.benchmark: needs data\.id and data\.splits\.held_out"),
        ("evaluate", {**RECIPE["evaluate"], "max_rows": 8}, "needs the whole split: take out evaluate.max_rows"),
        ("evaluate", {"metrics": ["f1"], "benchmark": {"id": "a/b", "task": "t", "metric": "accuracy"}},
         r"'accuracy' is not one of evaluate\.metrics"),
    ],
)  # fmt: skip
def test_figures_of_other_rows_are_no_result(section: str, values: dict[str, Any], fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        parse_recipe({**RECIPE, section: values})
