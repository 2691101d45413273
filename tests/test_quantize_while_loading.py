"""``from_pretrained(..., quantization_config=GPTQ(...).as_config(...))`` gives what loading and quantizing gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import hfcompress
from hfcompress.errors import DataError, ModelError
from hfcompress.packed import packed_layers
from hfcompress.quantization import METHODS
from tests.conftest import token_batches
from tests.runs import model_files, write_text

pytestmark = pytest.mark.usefixtures("forked")

GPTQ = hfcompress.GPTQ(group_size=32)


def load(folder: Path, config: Any, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def same_tensors(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("form", ["batches", "texts", "file", "given tokenizer"])
def test_it_is_the_model_that_quantize_makes(form: str, llama_dir: Path, tmp_path: Path) -> None:
    file = write_text(tmp_path / "text.jsonl", rows=20)
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    batches = hfcompress.calibration_batches(texts, tokenizer, rows=10, length=32)
    if form == "given tokenizer":
        for found in llama_dir.glob("tokenizer*"):
            found.unlink()
    data = {"batches": batches, "file": str(file)}.get(form, texts)
    given = {"processor": tokenizer} if form == "given tokenizer" else {}
    model = load(llama_dir, GPTQ.as_config(data, rows=10, length=32, **given))
    expected = AutoModelForCausalLM.from_pretrained(llama_dir)
    hfcompress.quantize(expected, GPTQ, batches)
    assert same_tensors(model, expected)
    assert len(packed_layers(model)) == 14
    assert model.config.to_dict() == expected.config.to_dict()
    assert (model.is_quantized, model.training) == (False, False)


@pytest.mark.usefixtures("few_tokens_are_fine")
@pytest.mark.filterwarnings("ignore:Group sizes that do not divide:UserWarning")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_a_config(name: str, llama_dir: Path) -> None:
    method = METHODS[name]()
    config = method.as_config(token_batches(2) if method.needs_calibration else None)
    assert json.loads(json.dumps(config.to_dict()))["method"] == type(method).__name__
    model, expected = load(llama_dir, config), AutoModelForCausalLM.from_pretrained(llama_dir)
    hfcompress.quantize(expected, method, token_batches(2))
    assert same_tensors(model, expected)
    assert type(model.model.layers[0].mlp.up_proj) is not torch.nn.Linear


def test_both_ways_of_saving_write_what_stock_transformers_loads(llama_dir: Path, tmp_path: Path) -> None:
    batches = token_batches(4)
    model = load(llama_dir, GPTQ.as_config(batches), dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(batches[0]["input_ids"]).logits.float()
    model.save_pretrained(tmp_path / "plain")
    saved = hfcompress.save_compressed(model, tmp_path / "ours", verify=True)
    assert saved.verification is not None
    assert not saved.verification.with_hfcompress
    assert model_files(tmp_path / "plain") == model_files(tmp_path / "ours")
    config = json.loads((tmp_path / "plain" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert (again(batches[0]["input_ids"]).logits.float() - logits).abs().max() <= 0.05 * logits.abs().max()


def test_a_config_made_anew_in_a_fresh_process_is_known(llama_dir: Path) -> None:
    code = (
        "import sys, hfcompress; from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=hfcompress.RTN().as_config()); "
        "print(model.config.quantization_config['quant_method'])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(llama_dir)], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "compressed-tensors"


def test_a_classifier_is_calibrated_on_padded_texts(bert_dir: Path, tmp_path: Path) -> None:
    file = write_text(tmp_path / "text.jsonl", rows=12, words=9)
    config = hfcompress.GPTQ(group_size=32).as_config(str(file))
    model = AutoModelForSequenceClassification.from_pretrained(bert_dir, quantization_config=config)
    assert len(packed_layers(model)) == 12


@pytest.mark.parametrize(
    ("method", "data", "error", "message"),
    [
        (GPTQ, ["too short"], DataError, "less than 64 tokens together"),
        (GPTQ, "absent/name", DataError, "Data 'absent/name' cannot be opened"),
        (hfcompress.RTN(exclude=("*",)), None, ModelError, "leaves no linear layer"),
    ],
)
def test_what_is_wrong_is_said_before_weights_are_loaded(
    method: Any, data: Any, error: type[Exception], message: str, llama_dir: Path
) -> None:
    (llama_dir / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(error, match=message):
        load(llama_dir, method.as_config(data))


def test_data_are_asked_for_at_once() -> None:
    with pytest.raises(DataError, match=r"GPTQ needs calibration data: as_config\(dataset="):
        GPTQ.as_config()


def test_texts_need_a_tokenizer_in_the_folder(llama_dir: Path) -> None:
    for found in llama_dir.glob("tokenizer*"):
        found.unlink()
    with pytest.raises(DataError, match=r"the model's folder .* has none: give processor="):
        load(llama_dir, GPTQ.as_config(["some text"]))
