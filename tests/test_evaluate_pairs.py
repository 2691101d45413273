"""How sure a difference is, and how long one call takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, ViTConfig, ViTForImageClassification

from hfcompress.errors import DataError
from hfcompress.evaluate import Latency, Measurement, measure, pack_hits, paired_bootstrap, unpack_hits
from hfcompress.evaluate.metrics import Form
from hfcompress.evaluate.quality import score_model
from hfcompress.evaluate.readers import Found, Reader, both
from hfcompress.outputs import Outputs
from tests.conftest import tiny_bert, tiny_llama, token_batches
from tests.test_evaluate import classified


def answers(count: int, right: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < right


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_hits_come_back_as_they_were(count: int) -> None:
    hits = answers(count, 0.7, count)
    packed = pack_hits(hits.tolist())
    assert np.array_equal(unpack_hits(packed), hits)
    assert len(packed) < count / 5 + 10  # a bit each, in base64


@pytest.mark.parametrize("text", ["", "9", "9:AA==", "1:%%", "x:AA=="])
def test_hits_that_cannot_be_read_are_an_error(text: str) -> None:
    with pytest.raises(DataError, match="'correct' of a measurement cannot be read"):
        unpack_hits(text)


def test_the_interval_is_that_of_resampled_pairs() -> None:
    before, after = answers(400, 0.9, 0), answers(400, 0.85, 1)
    low, high = paired_bootstrap(before, after)
    generator = np.random.default_rng(5)
    rows = generator.integers(0, 400, size=(10_000, 400))
    drawn = after[rows].mean(axis=1) - before[rows].mean(axis=1)
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.005)
    assert low < after.mean() - before.mean() < high


def test_pairing_narrows_the_interval_and_equal_answers_have_none() -> None:
    before = answers(400, 0.9, 0)
    assert paired_bootstrap(before, before) == (0.0, 0.0)
    few = before.copy()
    few[:4] = ~few[:4]
    low, high = paired_bootstrap(before, few)
    assert high - low < 0.03  # unpaired, two accuracies of 400 examples differ by 0.08 for nothing
    with pytest.raises(DataError, match="400 and 399 examples cannot be paired"):
        paired_bootstrap(before, before[1:])


def test_a_measurement_keeps_which_answers_were_right() -> None:
    model, batches = tiny_bert(), classified()
    found = measure(model, batches=batches, metrics=["accuracy"])
    with torch.no_grad():
        model.eval()
        right = [
            (model(**{k: v for k, v in batch.items() if k != "labels"}).logits.argmax(-1) == batch["labels"]).tolist()
            for batch in batches
        ]
    assert found.correct is not None
    assert unpack_hits(found.correct["accuracy"]).tolist() == [one for row in right for one in row]
    assert measure(model, batches=batches, metrics=["f1"]).correct is None
    assert Measurement.from_dict(json.loads(json.dumps(found.to_dict()))) == found


class Answered(Reader):
    """Has its answers when all batches have been seen, as questions over windows of a text have."""

    def forms(self, kind: Outputs) -> tuple[Form, ...]:
        return ("answers",)

    def read(self, model: nn.Module, batch: Mapping[str, Any], kind: Outputs, wanted: Set[Form]) -> Found:
        self.items += 1
        return {}

    def finish(self) -> Found:
        return {"answers": both(["The cat.", "no", ""], [["dog", "cat"], ["yes"], []])}


def test_answers_that_are_known_at_the_end_are_kept_one_by_one() -> None:
    scores = score_model(tiny_bert(), classified(), ["exact_match", "answer_f1"], reader=Answered())
    assert scores.values["exact_match"] == pytest.approx(2 / 3)
    assert scores.hits == {"exact_match": [True, False, True]}


def test_the_slow_end_is_the_nearest_rank() -> None:
    found = Latency.of("forward pass", 1, 8, [0.001 * one for one in range(100, 0, -1)])
    assert (found.median_ms, found.p95_ms, found.calls) == (pytest.approx(50.5), pytest.approx(95.0), 100)
    assert Latency.of("forward pass", 1, 8, [0.25]).p95_ms == 250


def test_latency_says_what_was_timed() -> None:
    rows = measure(tiny_bert(), batches=classified(), metrics=["accuracy"]).latency
    assert rows is not None
    assert (rows.what, rows.batch, rows.length, rows.calls) == ("forward pass", 1, 16, 40)
    assert 0 < rows.median_ms <= rows.p95_ms
    images = [{"pixel_values": torch.rand(4, 1, 8, 8), "labels": torch.tensor([0, 1, 2, 1])}]
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8,
                       patch_size=4, num_channels=1, num_labels=3)  # fmt: skip
    found = measure(ViTForImageClassification(config), batches=images, metrics=["accuracy"])
    assert found.tokens_per_second is None
    assert found.latency is not None
    assert (found.latency.batch, found.latency.length) == (1, None)


def test_latency_of_decoding_counts_every_token_but_the_first(tokenizer: PreTrainedTokenizerFast) -> None:
    found = measure(tiny_llama(), batches=token_batches(1), metrics=["perplexity"], tokenizer=tokenizer,
                    prompt="the model", new_tokens=5)  # fmt: skip
    assert found.latency is not None
    prompt = len(tokenizer("the model")["input_ids"])
    assert (found.latency.what, found.latency.length, found.latency.calls) == ("new token", prompt, 5 * 4)
    assert found.correct is None
