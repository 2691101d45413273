"""Two more ways out for uneven models: zero-filled dense checkpoints, and remote code that a reader must trust."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertForNextSentencePrediction,
    GenerationConfig,
    PreTrainedModel,
)

import hfcompress
from hfcompress.checkpoint import Probe
from hfcompress.errors import CheckpointError, ModelError
from hfcompress.structure import shrink
from hfcompress.structure.shapes import meta_twin, record_shapes, uneven_shapes
from tests.families import FAMILIES as STRUCTURE_FAMILIES
from tests.reloading import same_but_for_rounding
from tests.test_structure_shrink import _gated, _logits, _uneven
from tests.uneven import FAMILIES, bert, cut_bert, inputs_of, output_of

pytestmark = pytest.mark.usefixtures("forked")

WITH_LOGITS = [name for name in FAMILIES if name != "bert-base"]


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_filled_up_with_zeros_gives_the_same_logits(name: str) -> None:
    model = FAMILIES[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dense = hfcompress.to_dense(model, inputs_of(model))
    shapes = {key: value.shape for key, value in meta_twin(model).state_dict().items()}
    assert {key: value.shape for key, value in dense.state_dict().items()} == shapes
    torch.testing.assert_close(output_of(dense), output_of(model), rtol=1e-4, atol=1e-4)
    assert uneven_shapes(dense) == {}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", STRUCTURE_FAMILIES)
def test_shrunk_models_of_every_family_are_filled_up(name: str, tmp_path: Path) -> None:
    """Fused projections too: Phi-3's qkv and gate_up, ModernBERT's Wqkv and Wi, GPT-NeoX's heads in turns."""
    model = STRUCTURE_FAMILIES[name].model()
    _gated(model, _uneven)
    report = shrink(model)
    assert report.uneven
    dense = hfcompress.to_dense(model)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    stock = type(model).from_pretrained(tmp_path).eval()
    assert uneven_shapes(stock) == {}
    assert sum(one.numel() for one in stock.parameters()) > report.parameters[1]
    with torch.no_grad():
        torch.testing.assert_close(_logits(stock, name), _logits(model, name), rtol=1e-4, atol=1e-4)


WAYS_OUT = {
    "dense": (lambda model: None, {"uneven": "dense"}),
    "loader": (lambda model: None, {}),
    "remote-code": (lambda model: None, {"uneven": "remote-code"}),
    "packed": (lambda model: hfcompress.quantize(model, hfcompress.RTN(bits=8, group_size=None)), {}),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_how_a_model_generates_goes_with_it(way: str, tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    own = {"eos_token_id": [5, 7, 9], "max_new_tokens": 77}
    model.generation_config.update(**own)
    change, options = WAYS_OUT[way]
    change(model)
    hfcompress.save_compressed(model, tmp_path / "out", verify=False, **options)
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert {name: getattr(saved, name) for name in own} == own


def test_a_dense_copy_generates_by_a_config_of_its_own() -> None:
    model = FAMILIES["llama"]()
    model.generation_config.eos_token_id = [5, 7, 9]
    dense = hfcompress.to_dense(model)
    assert dense.generation_config.eos_token_id == [5, 7, 9]
    dense.generation_config.eos_token_id.append(11)
    assert model.generation_config.eos_token_id == [5, 7, 9]


def test_no_order_that_fits_is_an_error() -> None:
    """Here the config's own activation is not what the model in memory applies."""
    model = FAMILIES["bert"]()
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = torch.nn.Softmax(-1)
    with pytest.raises(ModelError, match="cannot be filled up with zeros"):
        hfcompress.to_dense(model)


def test_packed_models_are_refused() -> None:
    model = FAMILIES["bert"]()
    hfcompress.quantize(model, hfcompress.RTN(bits=8, group_size=None))
    with pytest.raises(ModelError, match="make the model dense first"):
        hfcompress.to_dense(model)
    with pytest.raises(ModelError, match="cannot be packed"):
        hfcompress.checkpoint.remote_code.refuse_remote_code(model)


def test_saved_dense_is_verified_with_stock_transformers(tmp_path: Path) -> None:
    model = FAMILIES["bert"]()
    saved = hfcompress.save_compressed(model, tmp_path / "out", uneven="dense", verify=True)
    assert saved.format == "plain"
    assert saved.verification is not None
    assert not saved.verification.with_hfcompress
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert uneven_shapes(model) != {}


def test_saved_for_the_loader_is_verified_with_hfcompress(tmp_path: Path) -> None:
    saved = hfcompress.save_compressed(FAMILIES["bert"](), tmp_path / "out", verify=True)
    assert saved.format == "hfcompress"
    assert saved.verification is not None
    assert saved.verification.with_hfcompress
    assert same_but_for_rounding(saved.verification)
    summary = hfcompress.inspect_checkpoint(tmp_path / "out")
    assert summary.uneven["bert.encoder.layer.1.attention.self"] == {"all_head_size": 8, "num_attention_heads": 1}
    assert next(iter(summary.uneven)).startswith("bert.encoder.layer.0")


REMOTE = """
import sys, torch
from safetensors.torch import load_file
import transformers
for line in sys.argv[1:]:
    name, auto, kind = line.split(",")
    try:
        getattr(transformers, kind).from_pretrained(name)
        print(name, "untrusted loaded")
    except RuntimeError:
        print(name, "untrusted stopped")
    model = getattr(transformers, auto).from_pretrained(name, trust_remote_code=True).eval()
    probe = load_file(name + ".probe")
    expected = probe.pop("expected")
    with torch.no_grad():
        found = model(**probe)[0]
        near = torch.allclose(found, expected, rtol=0, atol=2**-20 * float(expected.abs().max()))
        print(name, type(model).__name__, near)
    model.save_pretrained(name + "-again")
assert "hfcompress" not in sys.modules
"""
AUTO = {
    "bert": "AutoModelForSequenceClassification", "llama": "AutoModelForCausalLM", "gpt2": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification", "t5": "AutoModelForSeq2SeqLM",
}  # fmt: skip


def test_remote_code_loads_without_hfcompress_where_it_is_trusted(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    asked, expected = [], []
    for name, auto in AUTO.items():
        model: PreTrainedModel = FAMILIES[name]()
        hfcompress.save_compressed(model, tmp_path / name, uneven="remote-code")
        probe = {key: value.clone() for key, value in inputs_of(model).items()}
        save_file({**probe, "expected": output_of(model)}, tmp_path / f"{name}.probe")
        asked.append(f"{name},{auto},{type(model).__name__}")
        expected += [f"{name} untrusted stopped", f"{name} Uneven{type(model).__name__} True"]
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", REMOTE, *asked],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert run.stdout.splitlines() == expected, run.stdout + run.stderr
    assert (tmp_path / "bert-again" / "modeling_uneven.py").is_file()


def test_saved_with_remote_code_is_verified_by_the_class_that_runs_it(tmp_path: Path) -> None:
    model = cut_bert(bert(BertForNextSentencePrediction))  # has no Auto class of its own
    saved = hfcompress.save_compressed(model, tmp_path / "out", uneven="remote-code", verify=True)
    assert saved.format == "remote code"
    assert saved.verification is not None
    assert (saved.verification.loaded_by, saved.verification.with_hfcompress) == ("AutoModel", False)
    assert same_but_for_rounding(saved.verification)


def test_verifying_runs_the_code_of_a_folder_only_if_told_to(tmp_path: Path) -> None:
    model, ran = FAMILIES["bert"](), tmp_path / "ran"
    hfcompress.save_compressed(model, tmp_path / "out", uneven="remote-code")
    with (tmp_path / "out" / "modeling_uneven.py").open("a") as code:
        code.write(f"open({str(ran)!r}, 'w').close()\n")
    probe = Probe.of(model)
    with pytest.raises(CheckpointError, match=r"code of its own, which was not run.* pass trust_remote_code=True"):
        hfcompress.verify_checkpoint(tmp_path / "out", probe)
    assert not ran.exists()
    assert same_but_for_rounding(hfcompress.verify_checkpoint(tmp_path / "out", probe, trust_remote_code=True))
    assert ran.exists()


def test_fresh_models_in_uneven_shapes(tmp_path: Path) -> None:
    model = FAMILIES["bert"]()
    record_shapes(model)
    model.save_pretrained(tmp_path)
    fresh = hfcompress.from_config(AutoConfig.from_pretrained(tmp_path), AutoModelForSequenceClassification)
    assert uneven_shapes(fresh) == uneven_shapes(model)
    assert fresh.config.quantization_config["modules"] == uneven_shapes(model)
    dense = hfcompress.from_config(bert().config, AutoModelForSequenceClassification)
    assert uneven_shapes(dense) == {}
