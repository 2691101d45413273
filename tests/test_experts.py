"""Mixtures of experts whose experts are slices of one tensor: each matrix is packed, none stays dense silently."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig

import hfcompress
from hfcompress.calibration import experts as calibration_experts
from hfcompress.calibration.experts import in_portions
from hfcompress.errors import HFCompressError, ModelError
from hfcompress.packed import packed_layers
from hfcompress.packed.experts import SplitExperts, expert_linears, split_experts
from hfcompress.quantization.aware import QuantizeAwareOptions
from hfcompress.quantization.gptq import gptq_siblings
from hfcompress.quantization.plan import plan_linears
from hfcompress.quantization.rtn import round_to_nearest
from hfcompress.structure.experts import fused_experts, stored_matrices
from tests.conftest import VOCABULARY_SIZE, token_batches

pytestmark = pytest.mark.usefixtures("forked")

COMMON = {"vocab_size": VOCABULARY_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
SMALL = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
MIXTURES = {
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(**COMMON, **SMALL, shared_expert_intermediate_size=32),
    "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON, **SMALL),
}
METHODS = {"RTN": hfcompress.RTN(bits=4, group_size=16), "GPTQ": hfcompress.GPTQ(bits=4, group_size=16)}
LEAVES = {"mixtral": ["w1", "w3", "w2"]}
QWEN_LEAVES = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = "model.layers.{}.mlp.experts"


def mixture(name: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = MIXTURES[name]()
    config.update(changes)
    return AutoModelForCausalLM.from_config(config).eval()


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    """Enough tokens for every expert of these models."""
    return token_batches(count=count)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_batches(count=1, seed=1)[0]["input_ids"]).logits


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """The dense matrices of all experts by the names of dense checkpoints."""
    return {
        f"{name}.{one.name}": one.of(model.get_submodule(name)).clone()
        for name, parts in stored_matrices(model, list(fused_experts(model))).items()
        for one in parts
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_is_packed_and_stock_transformers_reads_it(name: str, method: str, tmp_path: Path) -> None:
    model = mixture(name)
    expected = [f"{EXPERTS.format(layer)}.{expert}.{leaf}" for layer in range(2) for expert in range(4)
                for leaf in LEAVES.get(name, QWEN_LEAVES)]  # fmt: skip
    assert list(matrices(model)) != []
    assert set(matrices(model)) == set(expected)
    report = hfcompress.quantize(model, METHODS[method], calibration=batches())
    assert [row.name for row in report.rows if ".experts." in row.name] == expected
    assert set(expected) < set(packed_layers(model))
    assert not fused_experts(model)
    assert not any(one.dim() == 3 for one in model.parameters())
    saved = hfcompress.save_compressed(model, tmp_path / "one", verify=True)
    assert saved.verification is not None
    assert not saved.verification.with_hfcompress
    model.save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    dense = sum(one.numel() for one in mixture(name).parameters())
    assert hfcompress.inspect_checkpoint(tmp_path / "one").total.parameters == dense
    assert sum(key.endswith(".weight_packed") and ".experts." in key for key in one) == len(expected)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths_reload(bits: int, tmp_path: Path) -> None:
    model = mixture("qwen3_moe")
    hfcompress.quantize(model, hfcompress.RTN(bits=bits))
    model.save_pretrained(tmp_path)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path))
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-6)


def test_float8_experts_are_read_and_saved_again(tmp_path: Path) -> None:
    model = mixture("mixtral")
    hfcompress.quantize(model, hfcompress.Float8())
    saved = hfcompress.save_compressed(model, tmp_path / "one", verify=True)
    assert saved.format == "compressed-tensors float-quantized"
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key].float(), two[key].float()) for key in one)
    assert one["model.layers.0.block_sparse_moe.experts.3.w2.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("method", [*METHODS.values(), hfcompress.Float8()], ids=lambda one: type(one).__name__)
def test_bfloat16_experts_reload(method: Any, tmp_path: Path) -> None:
    model = mixture("qwen2_moe").bfloat16()
    report = hfcompress.quantize(model, method, calibration=batches())
    assert max(row.relative_error for row in report.rows) < 0.2
    model.save_pretrained(tmp_path)
    found, expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MIXTURES)
def test_packed_experts_compute_what_the_fused_module_does(name: str) -> None:
    fused, split = mixture(name), mixture(name)
    hfcompress.quantize(split, METHODS["RTN"])
    for place, parts in stored_matrices(fused, list(fused_experts(fused))).items():
        for one in parts:
            packed = split.get_submodule(f"{place}.{one.name}")
            expected = round_to_nearest(one.of(fused.get_submodule(place)), 4, 16)
            assert torch.equal(packed.codes(), expected.codes)
            assert torch.equal(packed.weight_scale, expected.scale)
            one.of(fused.get_submodule(place)).copy_(packed.dequantize())
        tokens, chosen = torch.randn(9, 32), torch.rand(9, 4).topk(2).indices
        chosen[3] = 4  # beyond the experts: none
        weights = torch.rand(9, 2).masked_fill(chosen == 4, 0)
        twin = fused.get_submodule(place)
        twin.config._experts_implementation = "eager"
        torch.testing.assert_close(split.get_submodule(place)(tokens, chosen, weights), twin(tokens, chosen, weights))


@contextmanager
def seen_by_experts(model: PreTrainedModel, layer: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect the tokens and the experts that they are routed to in one layer of a dense model."""
    seen: list[tuple[Tensor, Tensor]] = []
    experts = model.get_submodule(EXPERTS.format(layer))
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    yield seen
    handle.remove()


def routed(model: PreTrainedModel, data: list[dict[str, Tensor]], expert: int) -> tuple[Tensor, Tensor]:
    """Return all tokens before the first layer's experts, and those that are routed to one expert."""
    with torch.no_grad(), seen_by_experts(model, 0) as seen:
        for batch in data:
            model(**batch)
    everyone = torch.cat([tokens for tokens, _ in seen])
    return everyone, torch.cat([tokens[(chosen == expert).any(1)] for tokens, chosen in seen])


def expected_codes(model: PreTrainedModel, tokens: Tensor, expert: int, share: float = 1.0) -> list[Tensor]:
    """Return the codes that GPTQ gives the matrices of an expert of the first layer that sees these tokens."""
    weights = matrices(model)
    gate, up, down = (weights[f"{EXPERTS.format(0)}.{expert}.{leaf}"] for leaf in QWEN_LEAVES)
    inner = nn.functional.silu(tokens @ gate.T) * (tokens @ up.T)
    first = gptq_siblings([gate, up], share * tokens.T @ tokens, 4, 16)
    return [one.codes for one in (*first, *gptq_siblings([down], share * inner.T @ inner, 4, 16))]


def codes_of(model: PreTrainedModel, expert: int) -> list[Tensor]:
    experts = model.get_submodule(EXPERTS.format(0))
    return [experts.get_submodule(f"{expert}.{leaf}").codes() for leaf in QWEN_LEAVES]


def same_codes(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Sums in another order may move a value over the edge between two codes, here and there."""
    return all(float((one != two).float().mean()) < 0.01 for one, two in zip(found, expected, strict=True))


def test_each_expert_is_calibrated_on_the_tokens_routed_to_it() -> None:
    model = mixture("qwen3_moe")
    for expert in range(4):
        everyone, own = routed(model, batches(), expert)
        assert 32 < len(own) < len(everyone)
        packed = mixture("qwen3_moe")
        report = hfcompress.quantize(packed, METHODS["GPTQ"], calibration=batches())
        rows = [row for row in report.rows if row.name.startswith(f"{EXPERTS.format(0)}.{expert}.")]
        assert [row.tokens for row in rows] == [len(own)] * 3
        assert same_codes(codes_of(packed, expert), expected_codes(model, own, expert))
        assert not same_codes(codes_of(packed, expert), expected_codes(model, everyone, expert))


@pytest.mark.parametrize("quality", ["fast", "best"])
def test_hessians_of_a_few_experts_at_a_time_give_the_same(quality: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, portions = mixture("qwen2_moe"), mixture("qwen2_moe")
    method = dataclasses.replace(METHODS["GPTQ"], quality=quality)
    hfcompress.quantize(whole, method, calibration=batches())
    monkeypatch.setattr(calibration_experts, "MOST_BYTES", 2 * 4 * (32**2 + 16**2))
    hfcompress.quantize(portions, method, calibration=batches())
    split = portions.model.layers[0]
    names = [name for linears in expert_linears(split).values() for name in linears]
    assert [len(one) for one in in_portions(split, ["self_attn.q_proj", *names])] == [6, 7]
    one, two = whole.state_dict(), portions.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_padding_is_routed_to_no_expert() -> None:
    plain, padded = mixture("qwen3_moe"), mixture("qwen3_moe")
    data = batches()
    longer = [{name: nn.functional.pad(one, (0, 8)) for name, one in batch.items()} for batch in data]
    first = hfcompress.quantize(plain, METHODS["GPTQ"], calibration=data)
    second = hfcompress.quantize(padded, METHODS["GPTQ"], calibration=longer)
    assert [row.tokens for row in first.rows] == [row.tokens for row in second.rows]
    assert all(same_codes(codes_of(plain, expert), codes_of(padded, expert)) for expert in range(4))


def without_expert(model: PreTrainedModel, expert: int) -> PreTrainedModel:
    """Have no token routed to an expert of the first layer: its row of the router is the others' worst."""
    router = model.model.layers[0].mlp.gate
    plain = router.forward

    def forward(states: Tensor) -> Any:
        scores = states @ router.weight.T
        scores[:, expert] = -1e4
        weights, chosen = scores.softmax(-1).topk(2)
        return scores, weights, chosen

    assert plain is not forward
    router.forward = forward
    return model


def test_an_expert_without_tokens_gets_the_average_token_of_its_layer() -> None:
    model, packed = (without_expert(mixture("qwen3_moe"), 2) for _ in range(2))
    everyone, own = routed(model, batches(), 2)
    assert len(own) == 0 < len(everyone)
    with pytest.warns(
        UserWarning, match=r"3 of 24 matrices of experts saw fewer.*experts\.2\.gate_proj: 0 tokens for 32"
    ):
        report = hfcompress.quantize(packed, METHODS["GPTQ"], calibration=batches())
    rows = {row.name: row for row in report.rows}
    assert rows[f"{EXPERTS.format(0)}.2.up_proj"].tokens == 0
    assert same_codes(codes_of(packed, 2), expected_codes(model, everyone, 2))


def test_an_expert_with_too_few_tokens_is_lent_what_it_lacks() -> None:
    model, data = mixture("qwen3_moe"), token_batches(count=1, rows=2)
    everyone, own = routed(model, data, 1)
    assert 0 < len(own) < len(everyone) == 32
    packed = mixture("qwen3_moe")
    with pytest.warns(UserWarning, match="the average token of their layer stands for those that they lack"):
        hfcompress.quantize(packed, METHODS["GPTQ"], calibration=data)
    lent = ((32 - len(own)) / len(everyone)) ** 0.5 * everyone
    gate = expected_codes(model, torch.cat([own, lent]), 1)[0]
    assert same_codes([codes_of(packed, 1)[0]], [gate])
    assert not same_codes([codes_of(packed, 1)[0]], [expected_codes(model, own, 1)[0]])


def test_what_decides_over_experts_stays_dense() -> None:
    model = mixture("qwen2_moe")
    hfcompress.quantize(model, METHODS["RTN"])
    ignored = set(model.config.quantization_config["ignore"])
    beside = [f"model.layers.{layer}.mlp.{name}" for layer in range(2) for name in ("gate", "shared_expert_gate")]
    assert {*beside, "lm_head"} == ignored
    assert not {*beside} & set(packed_layers(model))
    assert "model.layers.0.mlp.shared_expert.up_proj" in packed_layers(model)


REFUSED: dict[str, tuple[Any, str]] = {
    "zero points": (hfcompress.RTN(bits=4, symmetric=False), "symmetric=True"),
    "zero points, GPTQ": (hfcompress.GPTQ(symmetric=False), "symmetric=True"),
    "bits of each layer": (hfcompress.GPTQ(bits="auto", average_bits=5, group_size=16), "experts only where all have"),
    "AWQ": (hfcompress.AWQ(), "past their router. Use RTN or GPTQ"),
    "SmoothQuant": (hfcompress.SmoothQuant(), "would not round their inputs. Use RTN or GPTQ"),
    "W8A8": (hfcompress.RTN(activations=8), "would not round their inputs"),
    "float8 with inputs": (hfcompress.Float8(activations=True), "would not round their inputs"),
    "bitsandbytes": (hfcompress.BitsAndBytes(bits=8), "which bitsandbytes leaves dense"),
    "excluded": (hfcompress.RTN(exclude=("*.experts.*",)), "checkpoint in which experts are dense"),
    "one excluded": (hfcompress.RTN(exclude=("*.experts.1.*",)), "leaves 3 of the 12 matrices"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_stock_transformers_does_not_read_is_refused_before_any_work(case: str) -> None:
    method, message = REFUSED[case]
    model = mixture("qwen3_moe")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(ModelError, match="experts") as caught:
        hfcompress.quantize(model, method, calibration=batches(1))
    assert message in str(caught.value)
    assert before.keys() == model.state_dict().keys()
    assert not split_experts(model)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_uneven_experts_are_refused_before_any_work() -> None:
    model = mixture("qwen2_moe")
    shared = model.model.layers[1].mlp.shared_expert
    shared.gate_proj, shared.up_proj, shared.down_proj = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(16, 32)
    with pytest.raises(ModelError, match="shapes are uneven, and our loader for such models knows no packed experts"):
        hfcompress.quantize(model, METHODS["RTN"])
    assert not split_experts(model)


def test_quantized_experts_are_not_quantized_again() -> None:
    model = mixture("mixtral")
    hfcompress.quantize(model, METHODS["RTN"])
    with pytest.raises(ModelError, match="is quantized already"):
        hfcompress.quantize(model, METHODS["RTN"])
    assert len(split_experts(model)) == 2


def test_experts_are_not_trained_for_a_grid() -> None:
    with pytest.raises(
        ModelError, match=r"not trained for a grid\. Quantize the trained model with hfcompress\.quantize"
    ):
        plan_linears(mixture("mixtral"), QuantizeAwareOptions(bits=4))


def test_a_failure_puts_the_experts_back() -> None:
    model = mixture("mixtral")
    before, kinds = logits(model), [type(one) for one in model.modules()]

    def fail(name: str, rows: object) -> None:
        if name.endswith(".1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hfcompress.quantize(model, METHODS["GPTQ"], calibration=batches(), on_layer=fail)
    assert [type(one) for one in model.modules()] == kinds
    assert torch.equal(logits(model), before)


VARIANTS: dict[str, tuple[Any, Any]] = {
    "best": (hfcompress.GPTQ(group_size=16, quality="best"), None),
    "learnt": (hfcompress.GPTQ(group_size=16, quality="best", rounding_steps=4), None),
    "order and sweeps": (hfcompress.GPTQ(group_size=16, order="groups", sweeps=2), None),
    "absmax, per row": (hfcompress.GPTQ(group_size=None, scale="absmax"), None),
    "pruned": (hfcompress.GPTQ(group_size=16), hfcompress.SparseGPT(sparsity=0.5, pattern="2:4")),
    "head and embeddings": (hfcompress.RTN(bits=8, group_size=16, head=True, embeddings=True), None),
    "mse": (hfcompress.RTN(bits=4, group_size=16, scale="mse"), None),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_of_dense_models_hold_for_experts(variant: str, tmp_path: Path) -> None:
    method, prune = VARIANTS[variant]
    model = mixture("qwen2_moe")
    hfcompress.quantize(model, method, calibration=batches(), prune=prune)
    packed = packed_layers(model)
    experts = [one for name, one in packed.items() if ".experts." in name]
    assert len(experts) == 24
    if prune is not None:
        assert all(2 * one.nonzero() <= one.rows * one.columns for one in experts)
    model.save_pretrained(tmp_path)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path))
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-6)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, resumed = mixture("mixtral"), mixture("mixtral")
    hfcompress.quantize(whole, METHODS["GPTQ"], calibration=batches())

    def kill(name: str, rows: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hfcompress.quantize(resumed, METHODS["GPTQ"], calibration=batches(), on_layer=kill, shards=tmp_path)
    resumed = mixture("mixtral")
    report = hfcompress.quantize(resumed, METHODS["GPTQ"], calibration=batches(), shards=tmp_path)
    assert sum(".experts." in row.name for row in report.rows) == 24
    one, two = whole.state_dict(), resumed.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", MIXTURES)
def test_loaded_again_they_are_saved_packed_again(name: str, tmp_path: Path) -> None:
    model = mixture(name)
    hfcompress.quantize(model, METHODS["RTN"])
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    logits(loaded)
    loaded.save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "one/config.json").read_text() == (tmp_path / "two/config.json").read_text()
    loaded.get_submodule(EXPERTS.format(1)).down_proj.data[2].mul_(1.01)
    with pytest.warns(UserWarning, match=rf"{EXPERTS.format(1)}\.2\.\w+\.weight was changed since it was loaded"):
        loaded.save_pretrained(tmp_path / "three")
    assert not any(key.endswith("weight_packed") for key in load_file(tmp_path / "three/model.safetensors"))


def test_checkpoints_that_are_unpacked_at_the_first_call_are_saved_packed_again(tmp_path: Path) -> None:
    model = mixture("qwen3_moe")
    hfcompress.quantize(model, METHODS["RTN"])
    model.save_pretrained(tmp_path / "one")
    config = json.loads((tmp_path / "one/config.json").read_text())
    del config["quantization_config"]["dequantize"]  # as other writers of the format leave it
    (tmp_path / "one/config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "before")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    loaded.save_pretrained(tmp_path / "after")
    one, *others = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "before", "after"))
    for other in others:
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("one_by_one", [True, False])
def test_dense_checkpoints_of_either_form_are_quantized(one_by_one: bool, tmp_path: Path) -> None:
    mixture("mixtral").save_pretrained(tmp_path / "dense", save_original_format=one_by_one)
    stored = load_file(tmp_path / "dense/model.safetensors")
    assert ("model.layers.0.block_sparse_moe.experts.0.w1.weight" in stored) is one_by_one
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    hfcompress.quantize(model, METHODS["RTN"])
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(model))


def test_they_are_quantized_while_they_are_loaded(tmp_path: Path) -> None:
    dense, packed = tmp_path / "dense", mixture("qwen2_moe")
    packed.save_pretrained(dense)
    loaded = AutoModelForCausalLM.from_pretrained(dense, quantization_config=METHODS["RTN"].as_config())
    hfcompress.quantize(packed, METHODS["RTN"])
    assert isinstance(loaded.get_submodule(EXPERTS.format(0)), SplitExperts)
    torch.testing.assert_close(logits(loaded), logits(packed), rtol=0, atol=1e-6)
    zero_points = dataclasses.replace(METHODS["RTN"], symmetric=False).as_config()
    with pytest.raises(HFCompressError, match="symmetric=True"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=zero_points)


@pytest.mark.parametrize("name", MIXTURES)
def test_with_experts_left_dense_on_request_it_reloads(name: str, tmp_path: Path) -> None:
    model = mixture(name)
    report = hfcompress.quantize(model, hfcompress.BitsAndBytes(bits=8, exclude=("*.experts",)))
    assert not any(".experts" in row.name for row in report.rows)
    assert any("self_attn.q_proj" in row.name for row in report.rows)
    inputs = {"input_ids": token_batches(count=1)[0]["input_ids"]}
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path)(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
