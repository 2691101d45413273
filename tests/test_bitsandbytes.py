"""Models quantized with bitsandbytes: saved after a call, they come back from stock Transformers as they were."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, PreTrainedModel, T5Config

import hfcompress
from hfcompress.errors import MissingDependencyError, ModelError
from hfcompress.evaluate.size import model_size
from hfcompress.loading.quantizer import HFCompressQuantizer
from hfcompress.packed.bitsandbytes import bitsandbytes_layers
from hfcompress.publish.loading import packages_to_install
from hfcompress.quantization import BitsAndBytes, quantize
from hfcompress.recipe.options import Quantize
from tests.conftest import VOCABULARY_SIZE, tiny_bert, tiny_llama, token_batches
from tests.families import CLASSIFIER, DECODER, FAMILIES, SEQ2SEQ, inputs_of
from tests.reloading import Case, outputs, reload_all
from tests.runs import model_files
from tests.test_uneven_quantized import blocky
from tests.uneven import output_of

WIDE = {
    "llama": lambda: tiny_llama(),
    "bert": lambda: tiny_bert(hidden_size=64, intermediate_size=128),
    "gpt2": lambda: DECODER.from_config(
        GPT2Config(vocab_size=VOCABULARY_SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=64, pad_token_id=0)
    ),
    "t5": lambda: SEQ2SEQ.from_config(
        T5Config(
            vocab_size=VOCABULARY_SIZE,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=5,
            decoder_start_token_id=0,
        )
    ),
}
FOUR_BITS = {
    "nf4": BitsAndBytes(),
    "fp4": BitsAndBytes(kind="fp4"),
    "double": BitsAndBytes(double_quantization=True),
}
INT8 = ["bert", "llama", "gpt2", "gpt_neox", "vit", "t5", "whisper", "modernbert"]
CASES = [("llama", "fp4"), ("llama", "double"), *((name, "nf4") for name in WIDE), *((one, "int8") for one in INT8)]


def dense_case(family: str, method: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    if method == "int8":
        return FAMILIES[family].model(), inputs_of(FAMILIES[family])
    torch.manual_seed(0)
    return WIDE[family]().eval(), inputs_of(FAMILIES[family])


def quantized_case(family: str, method: str, folder: Path) -> tuple[Tensor, Case]:
    """Return the logits before the model was first saved, and the case."""
    model, inputs = dense_case(family, method)
    report = quantize(model, FOUR_BITS.get(method, BitsAndBytes(bits=8)))
    model.save_pretrained(folder / "uncalled")
    before = outputs(model, inputs)["logits"]  # calls may rearrange the weights
    return before, Case.write(folder, model, report, inputs)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Tensor, Case]]:
    root = tmp_path_factory.mktemp("bitsandbytes")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* stay dense")
        made = {case: quantized_case(*case, root / "-".join(case)) for case in CASES}
    reload_all(root, tmp_path_factory.mktemp("empty"))
    return made


@pytest.mark.parametrize(("family", "method"), CASES)
def test_saved_after_calls_it_is_the_same_model(
    family: str, method: str, cases: dict[tuple[str, str], tuple[Tensor, Case]]
) -> None:
    before, case = cases[family, method]
    case.saved_alike()
    assert model_files(case.folder / "uncalled") == model_files(case.folder / "model")
    assert {row.name for row in case.report.rows} == set(bitsandbytes_layers(case.model))
    assert torch.equal(case.expected["logits"], before)
    for plugins in (0, 1):
        case.reloads_alike(plugins)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_loaded_run_and_saved_again_it_has_the_same_files(
    family: str, method: str, cases: dict[tuple[str, str], tuple[Tensor, Case]]
) -> None:
    cases[family, method][1].saved_again_alike()


@pytest.mark.parametrize("method", FOUR_BITS)
def test_what_a_call_rearranges_on_some_processors_is_saved_as_it_was(method: str, tmp_path: Path) -> None:
    """The package's own conversion, which a call makes only with AVX512-BF16, is made here on every processor."""
    model = tiny_llama().eval()
    quantize(model, FOUR_BITS[method])
    model.save_pretrained(tmp_path / "before")
    for layer in bitsandbytes_layers(model).values():
        for note in layer._forward_pre_hooks.values():
            note(layer, ())
        converted = bitsandbytes.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
        layer.weight.data, layer.weight.quant_state = converted
        assert layer.weight.quant_state.packing_format_for_cpu
    model.save_pretrained(tmp_path / "after")
    assert model_files(tmp_path / "after") == model_files(tmp_path / "before")
    inputs = inputs_of(FAMILIES["llama"])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "after").eval()
    assert torch.equal(outputs(again, inputs)["logits"], outputs(model, inputs)["logits"])


@pytest.mark.parametrize(("kind", "stored"), [({}, "nf4"), ({"kind": "fp4"}, "fp4"), ({"bits": 8}, "int8")])
def test_a_checkpoint_is_counted_by_its_weights(kind: dict, stored: str, tmp_path: Path) -> None:
    model = tiny_llama()
    expected = sum(parameter.numel() for parameter in model.parameters())
    model.model.layers[0].mlp.up_proj.weight.data[:40] = 0
    quantize(model, BitsAndBytes(**kind))
    saved = hfcompress.save_compressed(model, tmp_path / "out")
    summary = hfcompress.inspect_checkpoint(tmp_path / "out")
    assert saved.format == summary.format == "bitsandbytes"
    assert summary.total.dtypes == (stored, "float32")
    assert summary.parameters == model_size(model).parameters == expected
    assert summary.nonzero == model_size(model).nonzero <= expected - 40 * 64
    assert packages_to_install(json.loads((tmp_path / "out" / "config.json").read_text()), True) == ["bitsandbytes"]


def test_sizes_that_some_processors_have_no_kernel_for_stay_dense() -> None:
    model = tiny_llama(intermediate_size=80)
    with pytest.warns(UserWarning, match=r"6 linear layers, such as model\.layers\.0\.mlp\.gate_proj, stay dense"):
        report = quantize(model, BitsAndBytes())
    assert {row.name.rpartition(".")[2] for row in report.rows} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert not any(isinstance(one, nn.Linear) and one.out_features % 32 for one in bitsandbytes_layers(model).values())
    with pytest.raises(ModelError, match=r"multiples of 64 inputs and 32 outputs\. Use bits=8"):
        quantize(tiny_bert(hidden_size=16, intermediate_size=48), BitsAndBytes())


def test_what_float16_cannot_hold_is_refused_and_nothing_changed() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds 100000, but LLM\.int8 .*65504"):
        quantize(model, BitsAndBytes(bits=8))
    assert not bitsandbytes_layers(model)
    with pytest.raises(ModelError, match="GPTQ"):
        quantize(model, BitsAndBytes(), prune=hfcompress.SparseGPT(sparsity=0.5))


def test_excluded_layers_stay_dense_and_a_failure_leaves_the_model(tmp_path: Path) -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def stop(name: str, rows: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, BitsAndBytes(), on_layer=stop)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    quantize(model, BitsAndBytes(exclude=("*.1.mlp.*",)))
    model.save_pretrained(tmp_path)
    for kind in (AutoModelForCausalLM, AutoModel):
        again = kind.from_pretrained(tmp_path)
        layers = getattr(again, "model", again).layers
        assert type(layers[1].mlp.down_proj) is nn.Linear
        assert type(layers[0].mlp.down_proj) is type(model.model.layers[0].mlp.down_proj)


def test_without_the_package_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(MissingDependencyError, match=r"pip install 'hfcompress\[bnb\]'"):
        quantize(tiny_llama(), BitsAndBytes())


@pytest.mark.parametrize("options", [{}, {"bits": 8}], ids=["nf4", "int8"])
def test_an_uneven_model_with_such_layers_inside(options: dict, tmp_path: Path) -> None:
    model = blocky()
    quantize(model, BitsAndBytes(**options))
    expected = output_of(model)
    assert isinstance(model.hf_quantizer, HFCompressQuantizer) or "Uneven" in type(model.hf_quantizer).__name__
    hfcompress.save_compressed(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules"]["model.layers.1.mlp.gate_proj"] == {"out_features": 64}
    assert packages_to_install(config, False) == ["hfcompress", "bitsandbytes"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(output_of(again), expected)
    assert again.model.layers[1].mlp.gate_proj.out_features == 64
    assert hfcompress.inspect_checkpoint(tmp_path / "out").format == "hfcompress bitsandbytes"


def test_adapters_train_on_it_and_recipes_name_it() -> None:
    model = tiny_llama().train()
    quantize(model, BitsAndBytes())
    model(**token_batches(count=1)[0]).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None
    assert model.is_quantized
    assert Quantize(method=BitsAndBytes(bits=8)).method.summary == "bitsandbytes, LLM.int8, a scale per row"


def test_classifiers_keep_their_heads() -> None:
    model = CLASSIFIER.from_config(FAMILIES["bert"].config())
    quantize(model, BitsAndBytes(bits=8))
    assert type(model.classifier) is nn.Linear
    assert type(model.bert.pooler.dense) is nn.Linear
