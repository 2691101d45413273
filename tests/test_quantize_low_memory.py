"""Layers that stay on disk until it is their turn give the same bits, and no two of them are in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
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

pytestmark = pytest.mark.usefixtures("forked")

GPTQ = hfcompress.GPTQ(group_size=32)
AUTO = hfcompress.GPTQ(bits="auto", average_bits=4.5, group_size=32)
BEST = hfcompress.GPTQ(bits=3, group_size=32, quality="best", tuning_steps=0)
METHODS = {
    "gptq": GPTQ,
    "auto": AUTO,
    "best": BEST,
    "learnt": replace(BEST, rounding_steps=4),
    "rtn": hfcompress.RTN(bits=4, group_size=32),
    "awq": hfcompress.AWQ(bits=4, group_size=32),
    "w8a8": hfcompress.RTN(activations=8),
    "smoothquant": hfcompress.SmoothQuant(),
    "float8": hfcompress.Float8(),
}
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


@pytest.mark.filterwarnings("ignore:No norm of Bert")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_layers_on_disk_give_the_same_bits(case: str, name: str, tmp_path: Path) -> None:
    folder, method = saved(case, tmp_path), METHODS[name]
    data = {"calibration": batches()} if method.needs_calibration else {}
    models = [opened(case, folder, on_disk) for on_disk in (False, True)]
    reports = [hfcompress.quantize(model, method, **data) for model in models]
    assert [row.relative_error for row in reports[1].rows] == [row.relative_error for row in reports[0].rows]
    expected, state = models[0].state_dict(), models[1].state_dict()
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    assert model_files(tmp_path / "1") == model_files(tmp_path / "0")
    with torch.no_grad():
        logits = [model(**batches()[0]).logits for model in models]
    assert torch.equal(*logits)


def test_scales_of_layers_on_disk_are_not_tuned(tmp_path: Path) -> None:
    folder, whole = saved("llama", tmp_path), replace(BEST, tuning_steps=None)
    models = [opened("llama", folder, on_disk) for on_disk in (False, True, True)]
    hfcompress.quantize(models[0], BEST, batches())
    assert hfcompress.quantize(models[1], whole, batches()).tuning is None
    expected = models[0].state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in models[1].state_dict().items())
    with pytest.raises(ModelError, match=r"tuning_steps=4 runs the dense model at every step, but some .* on disk"):
        hfcompress.quantize(models[2], replace(BEST, tuning_steps=4), batches())


def new_in_memory() -> tuple[int, int]:
    """Count the dense feed-forward weights and the Hessians, or factors of them, that came since ``gc.freeze``."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and not one.is_meta]
    dense = [one for one in tensors if type(one) is torch.nn.Parameter and tuple(one.shape) in {(128, 64), (64, 128)}]
    square = [one for one in tensors if type(one) is torch.Tensor and tuple(one.shape) in {(64, 64), (128, 128)}]
    return len(dense), sum(1 for one in square if one.dtype == torch.float32)


@pytest.fixture
def _only_what_is_new() -> Iterator[None]:
    """Leave all that is there already out of what is counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_only_what_is_new")
@pytest.mark.parametrize("name", ["gptq", "auto", "best"])
def test_no_two_layers_are_in_memory_at_a_time(name: str, tmp_path: Path) -> None:
    """Nor are Hessians of two: a layer of Llama has four inputs."""
    model = opened("llama", saved("llama", tmp_path), on_disk=True)
    seen = list[str]()

    def look(name: str, rows: Any) -> None:
        seen.append(name)
        dense, hessians = new_in_memory()
        assert (dense <= 3, hessians <= 4) == (True, True)
        for index, layer in enumerate(model.model.layers):
            weight = layer.mlp.up_proj
            assert isinstance(weight, PackedLinear) if index < len(seen) else weight.weight.is_meta

    data = [{"input_ids": batch["input_ids"]} for batch in token_batches(8, rows=3)]  # 48 rows of inputs are no square
    hfcompress.quantize(model, METHODS[name], data, on_layer=look)
    assert seen == [f"model.layers.{index}" for index in range(4)]
    assert new_in_memory() == (0, 0)
    assert not hasattr(model, "hf_device_map")


def test_bitsandbytes_is_refused_for_layers_on_disk(tmp_path: Path) -> None:
    model = opened("llama", saved("llama", tmp_path), on_disk=True)
    with pytest.raises(ModelError, match=r"has layers on disk\. bitsandbytes takes the whole dense model"):
        hfcompress.quantize(model, hfcompress.BitsAndBytes())
    assert is_offloaded(model)


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
