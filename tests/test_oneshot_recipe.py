"""Recipes prune in one shot, alone or in the pass that quantizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hfcompress.checks import check_before_work
from hfcompress.errors import RecipeError
from hfcompress.job import Job, Source
from hfcompress.pruning.oneshot import METHODS
from hfcompress.stages import Outcome, run_stage
from hfcompress.structure import stack_linears
from tests.runs import language_recipe, write_text


def outcome_of(stage: dict[str, Any], model: Path, tmp_path: Path) -> Outcome:
    recipe = language_recipe(model, write_text(tmp_path / "text.jsonl"), tmp_path / "out", stages=[stage])
    source = Source(recipe)
    check_before_work(source)
    return run_stage(recipe.stages[0], Job(source, model, tmp_path / "work"))


CALIBRATION = {"calibration_rows": 8, "calibration_length": 32}


@pytest.mark.parametrize("method", METHODS)
def test_a_prune_stage_prunes_what_it_names(method: str, llama_dir: Path, tmp_path: Path) -> None:
    options = {"method": method, "sparsity": 0.75, "pattern": "1:4", "exclude": ["*.mlp.*"]}
    options |= CALIBRATION if METHODS[method].needs_calibration else {}
    outcome = outcome_of({"prune": options}, llama_dir, tmp_path)
    for name, module in stack_linears(outcome.model).items():
        left = (module.weight != 0).view(len(module.weight), -1, 4).sum(-1)
        assert set(left.flatten().tolist()) == ({4} if ".mlp." in name else {1}), name
    assert outcome.summary == f"{METHODS[method].__name__}, 75.0% of the targeted weights pruned in the pattern 1:4"
    assert outcome.report is not None
    assert {row["tokens"] for row in outcome.report["rows"]} == {8 * 32 if METHODS[method].needs_calibration else 0}


def test_a_quantize_stage_prunes_in_its_pass(llama_dir: Path, tmp_path: Path) -> None:
    options = {"method": "gptq", "bits": 8, "group_size": 32, "prune": {"sparsity": 0.6}, **CALIBRATION}
    outcome = outcome_of({"quantize": options}, llama_dir, tmp_path)
    assert outcome.summary == "GPTQ, 8 bits, a scale per 32 columns, 60.0% pruned in the same pass"
    packed = outcome.model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(packed.weight, torch.Tensor)
    assert 0.6 - 1e-3 <= float((packed.weight == 0).float().mean()) < 0.65


def test_too_little_calibration_text_is_found_before_the_first_stage(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\[0\].prune.calibration_length is 100000 tokens, .* at most 128"):
        outcome_of({"prune": {"method": "wanda", "calibration_length": 100000}}, llama_dir, tmp_path)
