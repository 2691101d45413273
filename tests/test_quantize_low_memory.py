"""Layers that stay on disk until it is their turn give the same bits, and no two of them are in memory at a time."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import hfcompress
from hfcompress.errors import ModelError
from hfcompress.packed import PackedLinear, packed_layers
from hfcompress.structure.offload import is_offloaded, places_on_disk
from tests.conftest import tiny_bert, tiny_llama, token_batches
from tests.runs import model_files, run_command, write_text

GPTQ = hfcompress.GPTQ(group_size=32)
AUTO = hfcompress.GPTQ(bits="auto", average_bits=4.5, group_size=32)
METHODS = [GPTQ, AUTO, hfcompress.RTN(bits=4, group_size=32), hfcompress.AWQ(bits=4, group_size=32)]
CASES: dict[str, Any] = {
    "llama": (tiny_llama, AutoModelForCausalLM, "model.layers"),
    "bert": (tiny_bert, AutoModelForSequenceClassification, "bert.encoder.layer"),
}


def saved(case: str, folder: Path) -> Path:
    CASES[case][0](layers=4).save_pretrained(folder / case)
    return folder / case


def opened(case: str, folder: Path, on_disk: bool) -> PreTrainedModel:
    _, auto_class, stack = CASES[case]
    options = {"device_map": places_on_disk(CASES[case][0](), [stack])} if on_disk else {}
    model: PreTrainedModel = auto_class.from_pretrained(folder, **options)
    assert is_offloaded(model) is on_disk
    return model


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": batch["input_ids"]} for batch in token_batches(8)]


@pytest.mark.parametrize("method", METHODS, ids=lambda one: one.summary)
@pytest.mark.parametrize("case", CASES)
def test_layers_on_disk_give_the_same_bits(case: str, method: Any, tmp_path: Path) -> None:
    folder = saved(case, tmp_path)
    data = {"calibration": batches()} if method.needs_calibration else {}
    models = [opened(case, folder, on_disk) for on_disk in (False, True)]
    reports = [hfcompress.quantize(model, method, **data) for model in models]
    assert [row.relative_error for row in reports[1].rows] == [row.relative_error for row in reports[0].rows]
    expected, state = models[0].state_dict(), models[1].state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    assert model_files(tmp_path / "1") == model_files(tmp_path / "0")
    with torch.no_grad():
        logits = [model(**batches()[0]).logits for model in models]
    assert torch.equal(*logits)


def dense_in_memory() -> int:
    """Count the dense feed-forward weights of layers that are in memory, whoever holds them."""
    shapes = {(128, 64), (64, 128)}
    kinds = (one for one in gc.get_objects() if type(one) is torch.nn.Parameter)
    return sum(1 for one in kinds if tuple(one.shape) in shapes and not one.is_meta)


@pytest.mark.parametrize("method", [GPTQ, AUTO], ids=["4 bits", "auto"])
def test_no_two_layers_are_in_memory_at_a_time(method: Any, tmp_path: Path) -> None:
    model = opened("llama", saved("llama", tmp_path), on_disk=True)
    gc.collect()
    before, seen = dense_in_memory(), list[str]()

    def look(name: str, rows: Any) -> None:
        gc.collect()
        seen.append(name)
        assert dense_in_memory() - before <= 3
        for index, layer in enumerate(model.model.layers):
            weight = layer.mlp.up_proj
            assert isinstance(weight, PackedLinear) if index < len(seen) else weight.weight.is_meta

    hfcompress.quantize(model, method, batches(), on_layer=look)
    assert seen == [f"model.layers.{index}" for index in range(4)]
    gc.collect()
    assert dense_in_memory() == before
    assert not hasattr(model, "hf_device_map")


def test_a_run_in_memory_is_taken_up_from_disk(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)

    def stop(name: str, rows: Any) -> None:
        raise KeyboardInterrupt

    shards = tmp_path / "shards"
    with pytest.raises(KeyboardInterrupt):
        hfcompress.quantize(opened("llama", folder, False), GPTQ, batches(), on_layer=stop, shards=shards)
    whole, resumed = opened("llama", folder, False), opened("llama", folder, True)
    hfcompress.quantize(whole, GPTQ, batches())
    hfcompress.quantize(resumed, GPTQ, batches(), shards=shards)
    assert all(torch.equal(resumed.state_dict()[name], one) for name, one in whole.state_dict().items())


def test_a_damaged_weight_on_disk_is_named_when_its_layer_comes(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"mlp\.up_proj\.weight holds NaN"):
        hfcompress.quantize(opened("llama", folder, True), GPTQ, batches())


def test_the_command_and_from_pretrained_take_layers_from_disk(llama_dir: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl")
    words = [llama_dir, "--data", text, "--rows", 8, "--length", 32, "--group-size", 32]
    for name, more in (("plain", []), ("small", ["--low-memory"])):
        run_command("quantize", *words, *more, "-o", tmp_path / name)
    assert model_files(tmp_path / "small") == model_files(tmp_path / "plain")
    config = GPTQ.as_config(str(text), rows=8, length=32)
    places = places_on_disk(tiny_llama(), ["model.layers"])
    model = AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=config, device_map=places)
    model.save_pretrained(tmp_path / "loaded")
    assert len(packed_layers(model)) == 14
    name = "model.safetensors"
    assert (tmp_path / "loaded" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
