"""Unevenly pruned models that are quantized too: packed by us, or by another quantizer on top."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import hfcompress
from hfcompress.errors import ModelError
from hfcompress.loading.quantizer import HFCompressConfig
from hfcompress.packed import PackedLinear, packed_layers
from hfcompress.structure.shapes import record_shapes, uneven_shapes
from tests.families import FAMILIES as EVEN
from tests.families import inputs_of as even_inputs
from tests.forks import Forks
from tests.reloading import same_but_for_rounding
from tests.test_structure_shrink import _gated, _uneven
from tests.uneven import FAMILIES, TOKENS, inputs_of, llama, narrow, output_of, separate_heads

pytestmark = pytest.mark.usefixtures("forked")


def packed(
    name: str, method: type[hfcompress.RTN | hfcompress.GPTQ] = hfcompress.RTN, **options: object
) -> PreTrainedModel:
    model = FAMILIES[name]()
    with pytest.warns(UserWarning, match="Group sizes that do not divide"):
        hfcompress.quantize(model, method(**{"bits": 4, "group_size": 16, **options}), [inputs_of(model)])
    return model


def codes_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: layer.codes() for name, layer in packed_layers(model).items()}


@pytest.mark.filterwarnings("ignore:.*calibration tokens are fewer")
@pytest.mark.parametrize("method", [hfcompress.RTN, hfcompress.GPTQ])
@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_after_shrinking_reloads_to_the_same_codes(
    name: str, method: type[hfcompress.RTN | hfcompress.GPTQ], tmp_path: Path
) -> None:
    model = packed(name, method)
    expected = output_of(model)
    model.save_pretrained(tmp_path)  # after a forward
    reloaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(output_of(reloaded), expected)
    own, theirs = codes_of(model), codes_of(reloaded)
    assert own.keys() == theirs.keys() != set()
    assert all(torch.equal(own[key], theirs[key]) for key in own)


@pytest.mark.usefixtures("few_tokens_are_fine")
def test_a_model_that_shrink_made_uneven_is_quantized_and_verified(tmp_path: Path) -> None:
    """One of its layers has no neuron left, and so nothing to quantize there."""
    model = EVEN["llama"].model()
    _gated(model, _uneven)
    report = hfcompress.shrink(model)
    assert report.uneven
    rows = hfcompress.quantize(model, hfcompress.GPTQ(bits=4, group_size=16), [even_inputs(EVEN["llama"])]).rows
    saved = hfcompress.save_compressed(model, tmp_path / "out", verify=True)
    assert saved.format == "hfcompress pack-quantized"
    assert saved.verification is not None
    assert same_but_for_rounding(saved.verification)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {row.name for row in rows} == packed_layers(again).keys()
    empty = [name for name, one in again.named_modules() if isinstance(one, nn.Linear) and not one.weight.numel()]
    assert {name.rpartition(".")[2] for name in empty} == {"gate_proj", "up_proj", "down_proj"}
    own, theirs = codes_of(model), codes_of(again)
    assert all(torch.equal(own[key], theirs[key]) for key in own)


def test_a_reloaded_uneven_model_is_quantized_once(tmp_path: Path) -> None:
    """Its config names our loader for its shapes alone, which is no quantization."""
    uneven = FAMILIES["llama"]()
    record_shapes(uneven)
    uneven.save_pretrained(tmp_path / "uneven")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "uneven")
    with pytest.warns(UserWarning, match="Group sizes that do not divide"):
        hfcompress.quantize(model, hfcompress.RTN(bits=4, group_size=16))
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(output_of(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), output_of(model))
    with pytest.raises(ModelError, match="is quantized already"):
        hfcompress.quantize(model, hfcompress.RTN(bits=4, group_size=16))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_every_width_of_codes(bits: int, tmp_path: Path) -> None:
    model = packed("llama", bits=bits)
    model.save_pretrained(tmp_path)
    assert torch.equal(output_of(AutoModelForCausalLM.from_pretrained(tmp_path)), output_of(model))


def test_saving_again_gives_the_same_files(tmp_path: Path) -> None:
    model = packed("llama-tied")
    hfcompress.save_compressed(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "plain")
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "again")
    plain = {file.name: file.read_bytes() for file in (tmp_path / "plain").iterdir()}
    for folder in ("ours", "again"):
        files = {f.name: f.read_bytes() for f in (tmp_path / folder).iterdir() if f.name != "hfcompress.json"}
        assert files == plain, folder


def test_sharded_and_bfloat16(tmp_path: Path) -> None:
    model = packed("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    layer = reloaded.model.layers[0].mlp.gate_proj
    assert isinstance(layer, PackedLinear)
    assert layer.weight_scale.dtype == torch.bfloat16
    assert torch.equal(layer.codes(), model.model.layers[0].mlp.gate_proj.codes())


def test_the_base_class_finds_its_packed_layers(tmp_path: Path) -> None:
    model = packed("llama-classifier")
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert {f"model.{name}" for name in packed_layers(base)} == set(packed_layers(model))
    assert torch.equal(output_of(base), model.model(TOKENS)[0])


def test_the_config_holds_both_and_the_file_no_dense_weight(tmp_path: Path) -> None:
    model = packed("llama")
    hfcompress.save_compressed(model, tmp_path / "out", verify=True)
    recorded = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert recorded["quant_method"] == "hfcompress"
    assert recorded["quantization"]["quant_method"] == "compressed-tensors"
    assert recorded["modules"]["model.layers.0.mlp.gate_proj"] == {"out_features": 40}
    summary = hfcompress.inspect_checkpoint(tmp_path / "out")
    assert summary.format == "hfcompress pack-quantized"
    assert {group.bits for group in summary.groups} == {4}
    assert summary.parameters == sum(p.numel() for p in FAMILIES["llama"]().parameters())


def test_an_even_model_stays_a_stock_checkpoint(tmp_path: Path) -> None:
    model = llama()
    hfcompress.quantize(model, hfcompress.RTN(bits=4, group_size=16))
    hfcompress.save_compressed(model, tmp_path / "out")
    recorded = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert recorded["quant_method"] == "compressed-tensors"
    assert "modules" not in recorded


STOCK = """
import sys, transformers
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print("loaded")
except (RuntimeError, OSError, ValueError) as error:
    print(type(error).__name__, error)
assert "hfcompress" not in sys.modules
"""


def test_stock_transformers_stops_instead_of_loading_random_weights(tmp_path: Path, forks: Forks) -> None:
    """All that is uneven is packed, under names that it would pass over."""
    model = packed("llama")
    model.save_pretrained(tmp_path / "out")
    run = forks.run(["-c", STOCK, str(tmp_path / "out")], tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("RuntimeError"), run.stdout
    assert "model.layers.{0, 1}.mlp.gate_proj.weight" in run.stderr + run.stdout


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
INT8 = {"load_in_8bit": True}


def blocky() -> PreTrainedModel:
    """Widths that 64 divides: the 4-bit kernel that bitsandbytes has for CPUs takes no others."""
    model = llama(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=32, intermediate_size=128)
    for layer, heads, width in zip(model.model.layers, ([0, 1, 2, 3], [1, 3]), (128, 64)):
        own, ffn = layer.self_attn, layer.mlp
        separate_heads(own.q_proj, own.k_proj, own.v_proj, own.o_proj, heads, 32)
        narrow([ffn.gate_proj, ffn.up_proj], ffn.down_proj, width)
    return model


@pytest.mark.parametrize("options", [NF4, INT8], ids=["nf4", "int8"])
def test_bitsandbytes_on_top_while_loading_and_from_its_own_checkpoint(options: dict, tmp_path: Path) -> None:
    model = blocky()
    record_shapes(model)
    model.save_pretrained(tmp_path / "float")
    on_top = HFCompressConfig(quantization=BitsAndBytesConfig(**options))
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=on_top)
    layer = quantized.model.layers[1].mlp.gate_proj
    assert type(layer).__module__.startswith("bitsandbytes")
    assert (layer.in_features, layer.out_features) == (64, 64)
    assert quantized.is_quantized
    difference = (output_of(quantized) - output_of(model)).abs().max() / output_of(model).abs().max()
    assert 0 < difference < 0.3
    assert uneven_shapes(quantized) == uneven_shapes(model)

    quantized.save_pretrained(tmp_path / "quantized")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", output_loading_info=True)
    assert not any(info.values()), info
    assert type(again.model.layers[1].mlp.gate_proj) is type(layer)
    torch.testing.assert_close(output_of(again), output_of(quantized))
    recorded = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert recorded["quantization"]["quant_method"] == "bitsandbytes"
    size = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "quantized")}
    assert size["quantized"] < size["float"]


def test_dequantizing_leaves_an_uneven_float_model(tmp_path: Path) -> None:
    model = blocky()
    record_shapes(model)
    model.save_pretrained(tmp_path / "float")
    on_top = HFCompressConfig(quantization=BitsAndBytesConfig(**NF4))
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=on_top)
    dense = quantized.dequantize()
    assert not dense.is_quantized
    assert type(dense.model.layers[0].mlp.gate_proj) is nn.Linear
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(output_of(again), output_of(dense))
    assert uneven_shapes(again) == uneven_shapes(model)


def test_another_quantization_without_our_config_is_refused(tmp_path: Path) -> None:
    """Transformers' own message names the config class to pass, which has room for the other."""
    model = FAMILIES["llama"]()
    record_shapes(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized with HFCompressConfig but you are passing a BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
