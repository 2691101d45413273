"""A quantized model is saved by plain save_pretrained and comes back, through our loader, with the same logits.

``test_quantized_families.py`` has stock Transformers load what is saved, in a process without hfcompress.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import hfcompress
from hfcompress.errors import DataError, ModelError
from hfcompress.packed import PackedLinear, packed_layers
from hfcompress.quantization import GPTQ, METHODS, RTN, QuantizationReport, QuantizedLinear, quantize
from hfcompress.quantization.planned import fitting_group_size
from hfcompress.structure.stack import stack_linears
from tests.conftest import tiny_bert, tiny_llama, token_batches
from tests.test_calibration import bart_case, t5_case

AUTO = {"llama": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification, "t5": AutoModelForSeq2SeqLM}
METHOD_CASES = {
    "rtn8": RTN(),
    "rtn4": RTN(bits=4, group_size=16),
    "gptq4": GPTQ(bits=4, group_size=32),
    "gptq3": GPTQ(bits=3, group_size=None),
    "two_schemes": GPTQ(bits=4, group_size=64),
    "some_dense": RTN(exclude=("*.1.*",)),
}


def dense_model(family: str, dtype: torch.dtype, folder: Path) -> PreTrainedModel:
    """Return a tiny model as from_pretrained gives it in this dtype."""
    model = {"llama": tiny_llama, "bert": tiny_bert, "t5": lambda: t5_case()[0]}[family]()
    model.save_pretrained(folder)
    return AUTO[family].from_pretrained(folder, dtype=dtype)


def calibration(family: str) -> list[dict[str, Tensor]]:
    batches = t5_case()[1] if family == "t5" else token_batches(count=4)
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]


def logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


pytestmark = pytest.mark.usefixtures("few_tokens_are_fine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", AUTO)
@pytest.mark.parametrize("method", METHOD_CASES)
def test_reloaded_it_has_the_same_logits_and_codes(
    family: str, method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = dense_model(family, dtype, tmp_path / "dense")
    batches = calibration(family)
    report = quantize(model, METHOD_CASES[method], calibration=batches)
    before = logits(model, batches[0])
    assert before.dtype == dtype
    model.save_pretrained(tmp_path / "packed")
    again = AUTO[family].from_pretrained(tmp_path / "packed", dtype=dtype)
    assert torch.equal(logits(again, batches[0]), before)
    packed = packed_layers(model)
    assert {row.name for row in report.rows} == set(packed)
    state = load_file(tmp_path / "packed" / "model.safetensors")
    for name in packed:
        assert f"{name}.weight" not in state
        assert state[f"{name}.weight_packed"].dtype == torch.int32
    for name, value in model.state_dict().items():
        if name in state:
            assert torch.equal(state[name], value)


def test_a_reloaded_encoder_decoder_generates(tmp_path: Path) -> None:
    model, batches = bart_case()
    quantize(model, GPTQ(group_size=64), calibration=batches)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["dequantize"] is True
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 16  # of 32 and 48 columns
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.eval().generate(batches[0]["input_ids"], **options)
    assert torch.equal(again.generate(batches[0]["input_ids"], **options), expected)


def test_tied_embeddings_are_saved_once_and_the_file_shrinks(tmp_path: Path) -> None:
    model = dense_model("llama", torch.float32, tmp_path / "dense")
    quantize(model, RTN(bits=4, group_size=32))
    model.save_pretrained(tmp_path / "packed")
    state = load_file(tmp_path / "packed" / "model.safetensors")
    assert "model.embed_tokens.weight" in state
    assert "lm_head.weight" not in state
    assert model.lm_head.weight is model.model.embed_tokens.weight
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("packed", "dense")]
    assert sizes[0] < 0.4 * sizes[1]
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head"]


def test_gptq_keeps_logits_nearer_than_rounding(tmp_path: Path) -> None:
    batches = calibration("llama")
    dense = dense_model("llama", torch.float32, tmp_path)
    real = logits(dense, batches[0])
    distance = {}
    for method in (RTN(bits=3, group_size=32), GPTQ(bits=3, group_size=32)):
        model = AUTO["llama"].from_pretrained(tmp_path)
        quantize(model, method, calibration=batches)
        distance[type(method)] = float((logits(model, batches[0]) - real).norm())
    assert distance[GPTQ] < 0.9 * distance[RTN]


def test_exactly_the_linears_of_the_stacks_are_replaced() -> None:
    model = tiny_bert()
    expected = list(stack_linears(model))
    biases = {name: module.bias for name, module in stack_linears(model).items()}
    report = quantize(model, RTN())
    assert [row.name for row in report.rows] == expected
    assert isinstance(model.classifier, nn.Linear)
    assert isinstance(model.bert.pooler.dense, nn.Linear)
    assert all(module.bias is biases[name] for name, module in packed_layers(model).items())


def test_the_report_has_true_rows() -> None:
    model, batches = tiny_llama(), calibration("llama")
    weights = {name: module.weight.detach().clone() for name, module in stack_linears(model).items()}
    told: list[tuple[str, list[QuantizedLinear]]] = []
    report = quantize(model, RTN(bits=4, group_size=32), on_layer=lambda name, rows: told.append((name, list(rows))))
    for row in report.rows:
        change = model.get_submodule(row.name).weight - weights[row.name]
        assert row.relative_error == pytest.approx(float(change.norm() / weights[row.name].norm()), rel=1e-4)
        assert (row.bits, row.group_size, row.damping, row.tokens) == (4, 32, None, 0)
    assert [name for name, _ in told] == ["model.layers.0", "model.layers.1"]
    assert {row for _, rows in told for row in rows} == set(report.rows)
    again = quantize(tiny_llama(), GPTQ(group_size=32, damping=0.02), calibration=batches)
    assert {row.damping for row in again.rows} == {0.02}
    assert {row.tokens for row in again.rows} == {4 * 4 * 16}
    plain = json.loads(json.dumps(again.to_dict()))
    assert plain["method"] == "gptq"
    assert plain["rows"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert 0 < sum(row.seconds for row in again.rows) <= again.seconds


def test_padding_changes_nothing() -> None:
    batches = calibration("bert")
    padded = [
        {
            "input_ids": nn.functional.pad(batch["input_ids"], (0, 6)),
            "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 6)),
        }
        for batch in batches
    ]
    one, two = tiny_bert(), tiny_bert()
    first = quantize(one, GPTQ(group_size=32), calibration=batches)
    second = quantize(two, GPTQ(group_size=32), calibration=padded)
    assert [row.tokens for row in first.rows] == [row.tokens for row in second.rows]
    for name, module in packed_layers(one).items():
        assert float((module.codes() != packed_layers(two)[name].codes()).float().mean()) < 0.01


def test_pruned_weights_stay_zero() -> None:
    model = tiny_llama()
    masks = {}
    for name, module in stack_linears(model).items():
        masks[name] = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(len(masks))) < 0.5
        module.weight.data.masked_fill_(masks[name], 0)
    quantize(model, GPTQ(group_size=32), calibration=calibration("llama"))
    for name, module in packed_layers(model).items():
        assert not module.weight[masks[name]].any()


def test_group_sizes_that_do_not_divide_fall_back_and_say_so() -> None:
    model = tiny_llama(intermediate_size=80)
    with pytest.warns(UserWarning, match=r"48 -> 32 for 64 columns \(12 layers, such as .*48 -> 40 for 80 columns"):
        report = quantize(model, RTN(bits=4, group_size=48))
    assert {(row.group_size, row.requested_group_size) for row in report.rows} == {(32, 48), (40, 48)}


@pytest.mark.parametrize(
    ("in_features", "requested", "fitting"),
    [
        (64, 128, 64),
        (128, 128, 128),
        (576, 128, 64),
        (96, 128, 32),
        (288, 256, 32),
        (100, 20, 20),
        (100, 64, None),
        (64, None, None),
        (200, 128, 40),
    ],
)
def test_fitting_group_sizes(in_features: int, requested: int | None, fitting: int | None) -> None:
    assert fitting_group_size(in_features, requested) == fitting


def test_too_little_data_is_told_with_numbers() -> None:
    batches = token_batches(count=1, rows=1, length=10)
    with pytest.warns(
        UserWarning, match=r"10 calibration tokens are fewer than the 64 input columns of model\.layers\.0"
    ):
        quantize(tiny_llama(), GPTQ(group_size=32), calibration=batches)


def unchanged(model: PreTrainedModel, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    same = set(now) == set(before) and all(torch.equal(now[name], before[name]) for name in now)
    return same and getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "GPTQ needs calibration=batches"),
        ([], "calibration has 0 batches"),
        ([{"input_ids": torch.zeros(0, 4, dtype=torch.long)}], "calibration batch 0 has 0 rows"),
        ([torch.zeros(2, 2)], "calibration batch 0 is no dict of tensors but Tensor"),
    ],
)
def test_missing_data_is_refused_before_any_work(batches: object, message: str) -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match=message):
        quantize(model, GPTQ(group_size=32), calibration=batches)  # type: ignore[arg-type]
    assert unchanged(model, before)


def test_a_quantized_model_is_refused() -> None:
    model = tiny_llama()
    quantize(model, RTN())
    with pytest.raises(ModelError, match="quantized already"):
        quantize(model, RTN())


def test_excluding_everything_or_nothing_known_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"leaves no linear layer .* names like 'model\.layers\.0\.self_attn\.q_proj'"
    ):
        quantize(tiny_llama(), RTN(exclude=("*_proj",)))
    with pytest.raises(ModelError, match=r"exclude pattern '\*\.dwn_proj' matches no module"):
        quantize(tiny_llama(), RTN(exclude=("*.dwn_proj",)))
    quantize(tiny_llama(), RTN(exclude=("lm_head",)))


@pytest.mark.parametrize("method", [RTN(), GPTQ(group_size=32)], ids=["rtn", "gptq"])
def test_a_damaged_weight_is_refused_by_name(method: RTN | GPTQ) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        quantize(model, method, calibration=calibration("llama"))
    assert not packed_layers(model)


def test_shared_weights_are_refused() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj shares its weight"):
        quantize(model, RTN())


def test_a_failure_half_way_leaves_the_model_as_it_was() -> None:
    model = tiny_llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.model.layers[1].post_attention_layernorm.weight.data.fill_(torch.inf)
    with pytest.raises(ModelError, match=r"model\.layers\.1: the inputs of mlp\.gate_proj"):
        quantize(model, GPTQ(group_size=32), calibration=calibration("llama"))
    model.model.layers[1].post_attention_layernorm.weight.data.fill_(1)
    assert unchanged(model, before)
    assert model.training

    def stop(name: str, rows: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, RTN(), on_layer=stop)
    assert unchanged(model, before)


def test_an_encoder_alone_is_a_model_too() -> None:
    model, batches = t5_case()
    report = quantize(
        model.get_encoder(), GPTQ(group_size=16), calibration=[{"input_ids": b["input_ids"]} for b in batches]
    )
    assert len(report.rows) == 2 * 6


def test_training_mode_and_gradients_survive() -> None:
    model = tiny_llama().train()
    quantize(model, GPTQ(group_size=32), calibration=calibration("llama"))
    assert all(module.training for module in model.modules())
    model(**token_batches(count=1)[0]).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_methods_are_named_and_the_door_is_open() -> None:
    assert {
        "rtn": RTN,
        "gptq": GPTQ,
        "awq": hfcompress.AWQ,
        "bitsandbytes": hfcompress.BitsAndBytes,
        "smoothquant": hfcompress.SmoothQuant,
        "float8": hfcompress.Float8,
    } == METHODS
    report = hfcompress.quantize(tiny_llama(), hfcompress.RTN())
    assert isinstance(report, QuantizationReport)
    assert report.method == "rtn"
    assert isinstance(PackedLinear(8, 2, 4, None), nn.Module)
