"""Experts of any family that has Transformers' own layout, found by structure, and those that cannot be packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hfcompress
from hfcompress.errors import ModelError
from hfcompress.packed import packed_layers
from hfcompress.packed.experts import expert_linears
from hfcompress.publish.layers import experts_together
from hfcompress.structure.experts import fused_experts, stored_matrices
from hfcompress.structure.offload import is_offloaded, places_on_disk
from tests.conftest import token_batches
from tests.runs import model_files, run_command, write_text

pytestmark = pytest.mark.usefixtures("forked")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4,
    "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_dense_layers": 0,
    "shared_expert_intermediate_size": 32, "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
FULL = {"layer_types": ["full_attention", "full_attention"]}
READ: dict[str, dict[str, Any]] = {
    "olmoe": {}, "phimoe": {}, "minimax": {}, "minimax_m2": {"head_dim": 8}, "glm4_moe": {"head_dim": 8},
    "deepseek_v2": {}, "deepseek_v3": {}, "dots1": {"head_dim": 8}, "ernie4_5_moe": {}, "flex_olmo": {},
    "hunyuan_v1_moe": {"head_dim": 8}, "lfm2_moe": FULL, "qwen3_next": {**FULL, "head_dim": 8},
    "afmoe": {"head_dim": 8}, "exaone_moe": {"head_dim": 8}, "nemotron_h": {
        "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
    },
}  # fmt: skip
REFUSED = {
    "granitemoe": "Transformers does not store its experts as one matrix after another",
    "gpt_oss": "its experts have biases",
    "llama4_text": "its class is none of Transformers' interface for experts",
    "jetmoe": "its class is none of Transformers' interface for experts",
    "aria_text": "its slices are stored inputs first",
}


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    config = CONFIG_MAPPING[family]
    known = config.__dataclass_fields__
    torch.manual_seed(0)
    options = {name: value for name, value in {**SIZES, **changes}.items() if name in known}
    return AutoModelForCausalLM.from_config(config(**options)).eval()


@pytest.mark.parametrize("family", READ)
def test_experts_of_other_families_are_packed_and_read(family: str, tmp_path: Path) -> None:
    model = tiny(family, **READ[family])
    matrices = stored_matrices(model, list(fused_experts(model)))
    expected = {f"{name}.{one.name}" for name, parts in matrices.items() for one in parts}
    report = hfcompress.quantize(model, hfcompress.RTN(bits=4, group_size=8))
    names = {name for linears in expert_linears(model).values() for name in linears}
    assert names == expected
    assert expected <= {row.name for row in report.rows} == set(packed_layers(model))
    assert not any(f".{word}." in f".{row.name}." for row in report.rows for word in ("gate", "router"))
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": token_batches(count=1)[0]["input_ids"]}
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path)(**inputs).logits
        logits = model(**inputs).logits
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize("family", REFUSED)
def test_experts_that_cannot_be_packed_are_refused_with_the_reason(family: str) -> None:
    model = tiny(family)
    before = [type(one) for one in model.modules()]
    with pytest.raises(ModelError, match="holds its experts as slices of one tensor") as caught:
        hfcompress.quantize(model, hfcompress.RTN(bits=4, group_size=8))
    assert REFUSED[family] in str(caught.value)
    assert "BitsAndBytes(exclude=" in str(caught.value)
    assert [type(one) for one in model.modules()] == before


def test_experts_that_compute_something_else_are_refused() -> None:
    model = tiny("olmoe")
    experts = type(model.model.layers[0].mlp.experts)
    unusual = type("UnusualExperts", (experts,), {"forward": lambda self, *args: 2 * experts.forward(self, *args)})
    model.model.layers[1].mlp.experts.__class__ = unusual
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts \(UnusualExperts\) computes something else"):
        hfcompress.quantize(model, hfcompress.RTN())


@pytest.mark.usefixtures("few_tokens_are_fine")
@pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h"])
def test_gptq_calibrates_them_too(family: str) -> None:
    first, second = (tiny(family, **READ[family]) for _ in range(2))
    data = token_batches(count=8)
    logits = first(**data[0]).logits.detach()
    options = {"bits": 3, "group_size": 8}
    hfcompress.quantize(first, hfcompress.RTN(**options))
    report = hfcompress.quantize(second, hfcompress.GPTQ(**options), calibration=data)
    assert all(row.tokens > 0 for row in report.rows)
    errors = [float((one(**data[0]).logits.detach() - logits).norm()) for one in (first, second)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("method", [hfcompress.GPTQ(group_size=16), hfcompress.RTN(bits=4, group_size=16)])
def test_layers_on_disk_give_the_same_bits(method: Any, tmp_path: Path) -> None:
    tiny("olmoe", num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    places = places_on_disk(tiny("olmoe", num_hidden_layers=3), ["model.layers"])
    whole, streamed = (
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", device_map=one, offload_folder=tmp_path / "merged" if one else None
        )
        for one in (None, places)
    )
    assert is_offloaded(streamed)
    data = token_batches(count=8)

    def look(name: str, rows: Any) -> None:
        index = int(name.rpartition(".")[2])
        held = [one for one in streamed.model.layers[: index + 1].parameters() if one.dim() > 1 and len(one) > 4]
        assert held == []
        assert all(one.is_meta for one in streamed.model.layers[index + 1 :].parameters())

    reports = [
        hfcompress.quantize(model, method, calibration=data, on_layer=on_layer)
        for model, on_layer in ((whole, None), (streamed, look))
    ]
    assert [row.relative_error for row in reports[0].rows] == [row.relative_error for row in reports[1].rows]
    one, two = whole.state_dict(), streamed.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(whole(**data[0]).logits, streamed(**data[0]).logits)


def test_a_run_in_memory_is_taken_up_from_disk(tmp_path: Path) -> None:
    tiny("olmoe", num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    places = places_on_disk(tiny("olmoe", num_hidden_layers=3), ["model.layers"])
    whole, stopped, resumed = (
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", device_map=one, offload_folder=tmp_path / "merged" if one else None
        )
        for one in (None, None, places)
    )
    method, data = hfcompress.GPTQ(group_size=16), token_batches(count=8)

    def stop(name: str, rows: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hfcompress.quantize(stopped, method, calibration=data, on_layer=stop, shards=tmp_path / "shards")
    hfcompress.quantize(resumed, method, calibration=data, shards=tmp_path / "shards")
    hfcompress.quantize(whole, method, calibration=data)
    assert all(torch.equal(resumed.state_dict()[name], one) for name, one in whole.state_dict().items())


def test_the_command_takes_experts_from_disk(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    dense, text = tmp_path / "dense", write_text(tmp_path / "text.jsonl")
    tiny("olmoe", vocab_size=len(tokenizer)).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    words = [dense, "--data", text, "--rows", 8, "--length", 32, "--group-size", 16]
    for name, more in (("plain", []), ("small", ["--low-memory"])):
        run_command("quantize", *words, *more, "-o", tmp_path / name)
    assert model_files(tmp_path / "small") == model_files(tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "plain", "small", "text.jsonl"]


def test_a_card_has_one_row_for_the_experts_of_a_layer() -> None:
    report = hfcompress.quantize(tiny("olmoe"), hfcompress.GPTQ(group_size=16), calibration=token_batches(count=8))
    rows = report.to_dict()["rows"]
    shown = experts_together(rows)
    names = [row["name"] for row in shown]
    assert len(rows) == 2 * (4 + 12)
    assert len(names) == 2 * (4 + 3)
    assert names[3:5] == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.experts.*.gate_proj (4 experts)"]
    experts = [row for row in rows if row["name"].startswith("model.layers.0.mlp.experts.") and "gate" in row["name"]]
    tokens = [row["tokens"] for row in experts]
    assert shown[4]["tokens"] == f"{min(tokens)} to {max(tokens)}"
    assert shown[4]["relative_error"] == pytest.approx(sum(row["relative_error"] for row in experts) / 4)
    assert shown[3] == rows[3]
