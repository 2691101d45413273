"""Metrics equal their reference implementations, and measuring leaves the model as it was."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import hfcompress
import hfcompress.evaluate.readers as readers
from hfcompress import devices
from hfcompress.errors import DataError, HFCompressError, ModelError
from hfcompress.evaluate import (
    METRICS,
    Measurement,
    StoredSize,
    decode_speed,
    evaluate_model,
    forward_speed,
    load_metric,
    measure,
    model_size,
    peak_memory_bytes,
)
from hfcompress.evaluate.speed import greedy
from hfcompress.packed import PackedLinear
from tests.conftest import VOCABULARY_SIZE, tiny_bert, tiny_llama, token_batches

Batches = list[dict[str, Tensor]]


def classified(count: int = 4, rows: int = 4, classes: int = 2) -> Batches:
    """Token batches with one class a row."""
    generator = torch.Generator().manual_seed(1)
    labels = [torch.randint(0, classes, (rows,), generator=generator) for _ in range(count)]
    return [{**batch, "labels": one} for batch, one in zip(token_batches(count, rows), labels)]


def with_ignored(batches: Batches) -> Batches:
    """The same batches with about a third of the labels at -100, a whole row among them."""
    generator = torch.Generator().manual_seed(2)
    for batch in batches:
        batch["labels"][torch.rand(batch["labels"].shape, generator=generator) < 0.33] = -100
        batch["labels"][0] = -100
    return batches


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(
        vocab_size=VOCABULARY_SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=5, dropout_rate=0.0))  # fmt: skip


def tiny_encoder(kind: Any, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(BertConfig(vocab_size=VOCABULARY_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, pad_token_id=0, **changes))  # fmt: skip


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_classification_metrics_equal_sklearn(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    labels, guesses = (torch.randint(0, classes, (200,), generator=generator).tolist() for _ in range(2))
    labels = [0 if one == classes - 1 and classes == 5 else one for one in labels]  # a class that is never right
    found = METRICS["f1"]().compute(predictions=guesses, references=labels)["f1"]
    average = "binary" if classes == 2 else "macro"
    assert found == pytest.approx(f1_score(labels, guesses, average=average, zero_division=0), abs=1e-12)
    assert METRICS["accuracy"]().compute(predictions=guesses, references=labels)["accuracy"] == pytest.approx(
        accuracy_score(labels, guesses)
    )


def test_f1_uses_the_number_of_labels_of_the_task() -> None:
    both = {"predictions": [0, 1, 1, 0], "references": [0, 1, 0, 0]}
    labels, guesses = both["references"], both["predictions"]
    assert METRICS["f1"]().compute(**both, num_labels=2)["f1"] == pytest.approx(f1_score(labels, guesses))
    macro = f1_score(labels, guesses, average="macro")
    assert METRICS["f1"]().compute(**both, num_labels=3)["f1"] == pytest.approx(macro)
    assert METRICS["f1"]().compute(predictions=[0, 0], references=[0, 0])["f1"] == 0.0


def test_perplexity_is_the_exponential_of_the_mean_over_all_tokens() -> None:
    found = METRICS["perplexity"]().compute(negative_log_likelihood=[8.0, 1.0], tokens=[4, 1])
    assert found["perplexity"] == pytest.approx(math.exp(9 / 5))
    assert METRICS["perplexity"]().compute(negative_log_likelihood=[1e6], tokens=[1])["perplexity"] == math.inf
    with pytest.raises(DataError, match="at least one predicted token"):
        METRICS["perplexity"]().compute(negative_log_likelihood=[0.0], tokens=[0])


def test_metrics_write_nothing_to_disk_and_do_not_share_examples(tmp_path: Path) -> None:
    one, other = (METRICS["accuracy"](cache_dir=str(tmp_path / "cache")) for _ in range(2))
    one.add_batch(predictions=[1, 1], references=[1, 1])
    other.add_batch(predictions=[1, 1], references=[0, 0])
    assert one.compute()["accuracy"] == 1.0
    assert other.compute()["accuracy"] == 0.0
    assert one.experiment_id != other.experiment_id
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", METRICS)
def test_metrics_describe_themselves(name: str) -> None:
    metric = load_metric(name)
    assert metric.name == name
    assert metric.description
    assert isinstance(metric.features, datasets.Features)


def test_metrics_that_cannot_be_had_are_errors() -> None:
    with pytest.raises(HFCompressError, match=r"'acuracy' .* Did you mean 'accuracy'\? Known without the network"):
        load_metric("acuracy")
    with pytest.raises(DataError, match="trust_remote_code"):
        load_metric("somebody/metric")


@pytest.mark.parametrize("at_once", [readers.FLOAT32_AT_ONCE, 5 * VOCABULARY_SIZE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perplexity_equals_a_plain_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, at_once: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(readers, "FLOAT32_AT_ONCE", at_once)
    model, batches = tiny_llama().to(dtype).eval(), with_ignored(token_batches())
    found = evaluate_model(model, batches, ["perplexity", "accuracy"])
    total, hits, tokens = 0.0, 0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        total += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"))
        hits += int((logits.argmax(-1) == labels)[labels != -100].sum())
        tokens += int((labels != -100).sum())
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["accuracy"] == pytest.approx(hits / tokens)


def test_perplexity_does_not_depend_on_how_rows_are_batched() -> None:
    model, batches = tiny_llama(), with_ignored(token_batches())
    rows = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for batch in batches for i in range(4)]
    one, other = (evaluate_model(model, some, ["perplexity"])["perplexity"] for some in (batches, rows))
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("kind", ["t5", "masked-lm"])
def test_labels_of_other_models_are_not_shifted(kind: str) -> None:
    model = (tiny_t5() if kind == "t5" else tiny_encoder(BertForMaskedLM)).eval()
    batches = with_ignored(token_batches())
    found = evaluate_model(model, batches, ["perplexity"])["perplexity"]
    with torch.no_grad():
        losses = [(float(model(**batch).loss), int((batch["labels"] != -100).sum())) for batch in batches]
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert found == pytest.approx(math.exp(mean), rel=1e-4)


def test_classifier_metrics_equal_sklearn_on_the_models_own_guesses() -> None:
    model, batches = tiny_bert(num_labels=3).eval(), classified(classes=3)
    found = evaluate_model(model, batches, ["accuracy", "f1"])
    with torch.no_grad():
        inputs = [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches]
        guesses = torch.cat([model(**batch).logits.argmax(-1) for batch in inputs])
    labels = torch.cat([batch["labels"] for batch in batches])
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, guesses))
    assert found["f1"] == pytest.approx(f1_score(labels, guesses, average="macro", zero_division=0))


def test_token_classification_ignores_unlabelled_tokens() -> None:
    model, batches = tiny_encoder(BertForTokenClassification, num_labels=4).eval(), token_batches()
    for batch in batches:
        batch["labels"] = batch["labels"] % 4
    with_ignored(batches)
    found = evaluate_model(model, batches, ["accuracy"])["accuracy"]
    with torch.no_grad():
        guesses = torch.cat([model(b["input_ids"], b["attention_mask"]).logits.argmax(-1) for b in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    assert found == pytest.approx(float((guesses == labels)[labels != -100].float().mean()))


def test_measuring_leaves_training_flags_and_gradients_alone() -> None:
    model = tiny_llama()
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    evaluate_model(model, token_batches(1), ["perplexity"])
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(DataError):
        evaluate_model(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}], ["perplexity"])
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("metrics", [["perplexity"], ["accuracy"]])
def test_nan_logits_are_an_error(metrics: list[str]) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ModelError, match="NaN"):
        evaluate_model(model, token_batches(), metrics)


def test_nothing_to_measure_on_is_an_error() -> None:
    with pytest.raises(DataError, match="no batches"):
        evaluate_model(tiny_llama(), [], ["perplexity"])
    ignored = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in token_batches()]
    with pytest.raises(DataError, match="every label is -100"):
        evaluate_model(tiny_llama(), ignored, ["accuracy"])


def test_wrong_labels_are_errors() -> None:
    with pytest.raises(DataError, match="do not belong to labels"):
        evaluate_model(tiny_bert(), token_batches(), ["accuracy"])
    scores = [{**batch, "labels": batch["labels"].float()} for batch in classified()]
    with pytest.raises(DataError, match="floating point"):
        evaluate_model(tiny_bert(), scores, ["accuracy"])
    with pytest.raises(DataError, match="Metric 'f1' takes classes or decisions, but this task's answers are numbers"):
        evaluate_model(tiny_bert(num_labels=1), classified(), ["f1"])
    with pytest.raises(ModelError, match="no logits"):
        evaluate_model(tiny_llama().model, token_batches(), ["accuracy"])


@pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
def test_greedy_writes_exactly_the_tokens_asked_for_with_the_cache_on(make: Any) -> None:
    model = make().eval()
    prompt = token_batches(1, 1, 6)[0]["input_ids"]
    model.config.use_cache = False
    seen: list[Any] = []
    note = lambda _, __, kwargs: seen.append(kwargs.get("use_cache"))  # noqa: E731
    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    tokens = greedy(model, prompt[0], 9)
    hook.remove()
    assert tokens.shape == (9,)
    assert len(seen) == 9
    assert all(seen)
    assert model.config.use_cache is False


def test_greedy_equals_a_loop_without_cache() -> None:
    model = tiny_llama().eval()
    ids = token_batches(1, 1, 6)[0]["input_ids"]
    tokens = greedy(model, ids, 8)
    for token in tokens:
        with torch.no_grad():
            scores = model(ids, use_cache=False).logits[0, -1]
        scores[model.generation_config.eos_token_id] = -math.inf  # exactly 8 tokens were asked for
        assert int(scores.argmax()) == int(token)
        ids = torch.cat([ids, token.view(1, 1)], dim=1)


class Slow(nn.Module):
    """A layer that takes a known time."""

    def __init__(self, model: nn.Module, seconds: float) -> None:
        super().__init__()
        self.calls = 0
        model.register_forward_pre_hook(lambda *_: self.wait(seconds))

    def wait(self, seconds: float) -> None:
        self.calls += 1
        time.sleep(seconds)


def test_speeds_are_tokens_by_time() -> None:
    model = tiny_llama(layers=1)
    model.train()
    slow = Slow(model, 0.02)
    rate = decode_speed(model, token_batches(1, 1, 6)[0]["input_ids"], 4, runs=3)
    assert 2 < rate <= 50  # 50 is the bound that the wait sets
    assert slow.calls == 4 * 4  # a warm-up and three runs
    bert = tiny_bert(layers=1)
    Slow(bert, 0.05)
    rate = forward_speed(bert, classified(1)[0], runs=3)
    assert 40 < rate <= 4 * 16 / 0.05
    assert model.training


def test_speed_of_what_has_none_is_an_error() -> None:
    with pytest.raises(ModelError, match="cannot generate"):
        decode_speed(tiny_bert(), torch.ones(1, 4, dtype=torch.long), 4)
    with pytest.raises(DataError, match="2 or more"):
        decode_speed(tiny_llama(), torch.ones(1, 4, dtype=torch.long), 1)
    with pytest.raises(DataError, match="input_ids"):
        forward_speed(tiny_bert(), {"pixel_values": torch.ones(1, 3, 4, 4)})


def test_peak_memory_sees_a_large_tensor() -> None:
    code = (
        "import torch\n"
        "from hfcompress.evaluate.memory import peak_memory_bytes, reset_peak_memory\n"
        "before = peak_memory_bytes()\n"
        "large = torch.ones(50_000_000)\n"
        "after = peak_memory_bytes()\n"
        "assert 150e6 < after - before < 300e6, after - before\n"
        "del large\n"
        "assert peak_memory_bytes() > after - 5e6  # the kernel counts in batches of pages\n"
        "assert not reset_peak_memory() or peak_memory_bytes() < after - 100e6\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (peak_memory_bytes() or 0) > 50e6


def test_memory_that_loading_left_behind_is_not_the_models() -> None:
    """Freed blocks that the C library keeps are given back before the peak starts anew."""
    code = (
        "import torch\n"
        "from hfcompress.devices import keep_freed_memory\n"
        "from hfcompress.evaluate.memory import peak_memory_bytes, reset_peak_memory\n"
        "keep_freed_memory()\n"
        "reset_peak_memory()\n"
        "before = peak_memory_bytes()\n"
        "garbage = [torch.ones(5_000_000) for _ in range(10)]\n"
        "del garbage\n"
        "assert not reset_peak_memory() or peak_memory_bytes() < before + 50e6, peak_memory_bytes() - before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prune_and_quantize_keep_freed_memory_while_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(devices, "_set_thresholds", lambda *values: told.append(values))
    monkeypatch.setattr(devices._Kept, "for_good", False)  # a command that ran before in this process has asked for it
    hfcompress.prune(tiny_llama(), hfcompress.Magnitude(sparsity=0.5))
    assert told == [devices.NEVER, devices.AS_USUAL]
    with pytest.warns(UserWarning, match="Group sizes that do not divide") as warned:
        hfcompress.quantize(tiny_llama(), hfcompress.RTN(bits=4, group_size=48))
    assert warned[0].filename == __file__  # the caller's line, with nothing of ours in between
    assert told[2:] == [devices.NEVER, devices.AS_USUAL]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="Only glibc can be told what to keep.")
def test_memory_is_kept_while_a_model_is_compressed_and_given_back_then() -> None:
    """Page faults tell whether freed memory was asked of the kernel again."""
    code = (
        "import resource\n"
        "import torch\n"
        "from hfcompress.devices import freed_memory_kept, keep_freed_memory\n"
        "from hfcompress.evaluate.memory import peak_memory_bytes, reset_peak_memory\n"
        "def faults(megabytes):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10):\n"
        "        torch.ones(megabytes * 250_000)\n"
        "    pages = 10 * megabytes * 1_000_000 / resource.getpagesize()\n"
        "    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / pages\n"
        "assert faults(100) > 0.9\n"
        "with freed_memory_kept():\n"
        "    with freed_memory_kept():\n"
        "        assert faults(100) < 0.2\n"
        "    assert faults(100) < 0.05\n"
        "    held = peak_memory_bytes()\n"
        "assert not reset_peak_memory() or peak_memory_bytes() < held - 80e6\n"
        "assert faults(400) > 0.9  # more than the heap may have kept holes for\n"
        "keep_freed_memory()\n"
        "with freed_memory_kept():\n"
        "    faults(500)\n"
        "assert faults(500) < 0.05\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "THP_MEM_ALLOC_ENABLE": "0"})


def test_infinite_and_undefined_metrics_are_valid_json() -> None:
    metrics = {"perplexity": math.inf, "correlation": math.nan, "difference": -math.inf, "accuracy": 0.5}
    found = Measurement(parameters=4, nonzero=2, metrics=metrics, stored_dtypes=("bfloat16", "int32"))
    read = Measurement.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert math.isnan(read.metrics.pop("correlation"))
    assert read.metrics == {"perplexity": math.inf, "difference": -math.inf, "accuracy": 0.5}
    assert read.stored_dtypes == found.stored_dtypes
    with pytest.raises(DataError, match="Metric 'accuracy' is 'high', not a number or one of infinity"):
        Measurement.from_dict({"parameters": 1, "nonzero": 1, "metrics": {"accuracy": "high"}})


def test_a_ruined_model_has_infinite_perplexity() -> None:
    model = tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight *= 1e6
    assert evaluate_model(model, token_batches(1), ["perplexity"]) == {"perplexity": math.inf}


def test_model_size_counts_tied_and_packed_weights_logically() -> None:
    model = tiny_llama()
    before = model_size(model)
    assert before.parameters == model.num_parameters()
    assert before.bytes_on_disk is None
    layer = model.model.layers[0].mlp
    codes = torch.randint(-8, 8, layer.up_proj.weight.shape, generator=torch.Generator().manual_seed(0))
    dense_zeros = int((layer.up_proj.weight == 0).sum())
    layer.up_proj = PackedLinear.from_codes(codes, torch.ones(128, 2), None, bits=4, group_size=32)
    after = model_size(model)
    assert after.parameters == before.parameters
    assert before.nonzero - after.nonzero == int((codes == 0).sum()) - dense_zeros


def test_measurement_of_a_language_model(tokenizer: PreTrainedTokenizerFast) -> None:
    model, batches = tiny_llama(), token_batches()
    batches[0]["attention_mask"][0, 10:] = 0
    found = measure(model, batches=batches, metrics=["perplexity"], tokenizer=tokenizer, prompt="the model is",
                    new_tokens=5, stored=StoredSize(1000, 250, 4321))  # fmt: skip
    assert (found.parameters, found.nonzero, found.bytes_on_disk, found.sparsity) == (1000, 250, 4321, 0.75)
    assert found.metrics == evaluate_model(model, batches, ["perplexity"])
    assert (found.rows, found.tokens) == (16, 16 * 16 - 6)
    assert found.speed_kind == "decode, batch 1"
    assert found.tokens_per_second
    assert found.continuation
    assert len(found.continuation.split()) <= 5
    assert (found.dtype, found.device) == ("float32", "cpu")
    assert found.machine["threads"] == torch.get_num_threads()
    assert found.machine["torch"] == version("torch")
    assert Measurement.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_measurement_of_a_classifier_from_a_generator() -> None:
    model = tiny_bert()
    found = measure(model, batches=(batch for batch in classified()), metrics=["accuracy", "f1"])
    assert found.speed_kind == "forward, batch 4 x 16 tokens"
    assert found.continuation is None
    assert found.bytes_on_disk is None
    assert (found.parameters, found.rows) == (model.num_parameters(), 16)
    assert set(found.metrics) == {"accuracy", "f1"}


def test_measurements_with_other_fields_are_refused() -> None:
    with pytest.raises(DataError, match=r"lacks metrics, nonzero and has unknown size"):
        Measurement.from_dict({"parameters": 1, "size": 2})
