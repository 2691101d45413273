"""Checkpoints of unevenly pruned models load with plain from_pretrained once hfcompress is imported."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertModel,
    PreTrainedModel,
)

import hfcompress
from hfcompress.structure.shapes import meta_twin, record_shapes, resize_, uneven_shapes
from tests.uneven import (
    FAMILIES,
    TOKENS,
    bart,
    bert,
    cut_bert,
    cut_llama,
    gpt2,
    keep_outputs,
    llama,
    output_of,
    rows,
    t5,
    vit,
    whisper,
)

DENSE = {"bert": bert, "llama": llama, "gpt2": gpt2, "vit": vit, "bart": bart, "whisper": whisper, "t5": t5}


def saved(model: PreTrainedModel, folder: Path, **options: object) -> Path:
    assert record_shapes(model)
    model.save_pretrained(folder, **options)
    return folder


def reload(folder: Path, kind: type, **options: object) -> PreTrainedModel:
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE)
def test_a_model_as_its_config_says_has_nothing_to_record(make) -> None:
    model = make()
    model.config.quantization_config = {"quant_method": "hfcompress", "modules": {"gone": {}}, "version": 1}
    assert record_shapes(model) == {}
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE)
def test_pruning_by_zeros_records_nothing(make) -> None:
    """A checkpoint of dense shapes must not ask for a loader that it does not need."""
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data[:, ::2] = 0
    assert uneven_shapes(model) == {}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_reloaded_model_gives_the_same_logits(name: str, attention: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    reloaded = reload(saved(model, tmp_path), type(model), attn_implementation=attention)
    model.set_attn_implementation(attention)
    assert torch.equal(output_of(reloaded), output_of(model))
    assert uneven_shapes(reloaded) == uneven_shapes(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_saving_again_gives_the_same_files(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    first = saved(model, tmp_path / "first")
    reload(first, type(model)).save_pretrained(tmp_path / "second")
    assert files_of(tmp_path / "second") == files_of(first)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_record_is_all_that_a_fresh_model_needs(name: str) -> None:
    model = FAMILIES[name]()
    twin = meta_twin(model)
    resize_(twin, json.loads(json.dumps(uneven_shapes(model))))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in twin.state_dict().items()} == shapes


def test_slices_that_forgot_their_attributes_reload_with_the_right_ones(tmp_path: Path) -> None:
    model = bert()
    layer = model.bert.encoder.layer[0]
    layer.intermediate.dense.weight = nn.Parameter(layer.intermediate.dense.weight.data[:40].clone())
    layer.intermediate.dense.bias = nn.Parameter(layer.intermediate.dense.bias.data[:40].clone())
    layer.output.dense.weight = nn.Parameter(layer.output.dense.weight.data[:, :40].clone())
    reloaded = reload(saved(model, tmp_path), type(model))
    assert reloaded.bert.encoder.layer[0].intermediate.dense.out_features == 40
    assert reloaded.bert.encoder.layer[0].output.dense.in_features == 40
    assert torch.equal(output_of(reloaded), output_of(model))


def test_numbers_that_change_while_a_model_runs_are_not_shapes() -> None:
    model = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    model.model.rotary_emb.max_seq_len_cached = 10_000
    assert uneven_shapes(model) == {}
    cut_llama(model)
    assert "model.rotary_emb" not in uneven_shapes(model)


def test_layers_without_heads_or_neurons_reload(tmp_path: Path) -> None:
    model = cut_bert(bert(), heads=([], [0, 1]), widths=(0, 8))
    reloaded = reload(saved(model, tmp_path), type(model))
    assert reloaded.bert.encoder.layer[0].attention.self.query.out_features == 0
    assert reloaded.bert.encoder.layer[0].intermediate.dense.out_features == 0
    assert torch.equal(output_of(reloaded), output_of(model))


def test_plain_parameters_and_tuples_are_recorded() -> None:
    model = bert()
    model.bert.encoder.layer[0].scale = nn.Parameter(torch.ones(4))  # not in the config's own model: not a shape
    norm = model.bert.encoder.layer[0].output.LayerNorm
    norm.normalized_shape = (24,)
    norm.weight, norm.bias = nn.Parameter(torch.ones(24)), nn.Parameter(torch.zeros(24))
    shapes = uneven_shapes(model)
    assert shapes == {
        "bert.encoder.layer.0.output.LayerNorm": {"bias": [24], "normalized_shape": [24], "weight": [24]}
    }
    twin = meta_twin(model)
    resize_(twin, shapes)
    assert twin.bert.encoder.layer[0].output.LayerNorm.normalized_shape == (24,)


@pytest.mark.parametrize("implementation", [None, "static"])
def test_generates_with_dynamic_static_and_no_cache(implementation: str | None, tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    reloaded = reload(saved(model, tmp_path), AutoModelForCausalLM)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(TOKENS, use_cache=False, **options)
    assert torch.equal(reloaded.generate(TOKENS, cache_implementation=implementation, **options), expected)


def test_static_caches_that_chunked_prefill_makes_early_have_the_heads_of_each_layer(tmp_path: Path) -> None:
    """Transformers would make them all as the config counts heads."""
    model = FAMILIES["llama"]()
    reloaded = reload(saved(model, tmp_path), AutoModelForCausalLM)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(TOKENS, use_cache=False, **options)
    for one in (model, copy.deepcopy(reloaded), pickle.loads(pickle.dumps(reloaded))):
        found = one.generate(TOKENS, cache_implementation="static", prefill_chunk_size=4, **options)
        assert torch.equal(found, expected)
    dense = llama()
    assert dense._get_static_cache_init_shape() == (4, 4)


@pytest.mark.parametrize("name", ["bert", "llama-classifier"])
def test_base_class_loads_a_checkpoint_with_a_head(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    base = AutoModel.from_pretrained(saved(model, tmp_path))
    assert torch.equal(output_of(base), model.base_model(TOKENS)[0])


def test_head_class_loads_a_checkpoint_without_a_head(tmp_path: Path) -> None:
    model = cut_bert(bert(BertModel))
    headed, info = AutoModelForSequenceClassification.from_pretrained(saved(model, tmp_path), output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(headed.bert(TOKENS)[0], output_of(model))
    # Saved again with the head, the record carries the new class's names or still resolves.
    headed.save_pretrained(tmp_path / "headed")
    again = reload(tmp_path / "headed", AutoModelForSequenceClassification)
    assert torch.equal(output_of(again), output_of(headed))


def test_another_head_loads_the_checkpoint(tmp_path: Path) -> None:
    model = FAMILIES["bert"]()
    other = AutoModelForTokenClassification.from_pretrained(saved(model, tmp_path))
    assert [layer.intermediate.dense.out_features for layer in other.bert.encoder.layer] == [40, 17]


@pytest.mark.parametrize("name", ["bert", "llama-tied", "t5"])
def test_sharded(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    folder = saved(model, tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(output_of(reload(folder, type(model))), output_of(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    reloaded = reload(saved(model, tmp_path), type(model), dtype=torch.bfloat16)
    assert reloaded.dtype == torch.bfloat16
    own = dict(model.named_parameters())
    for key, value in reloaded.named_parameters():
        assert torch.equal(value, own[key].to(value.dtype)), key


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(device_map: str | dict[str, str], tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    reloaded = reload(saved(model, tmp_path), AutoModelForCausalLM, device_map=device_map)
    assert torch.equal(output_of(reloaded).cpu(), output_of(model))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    reloaded = reload(saved(FAMILIES["llama-tied"](), tmp_path), AutoModelForCausalLM)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


def test_tied_embeddings_of_another_size_stay_tied(tmp_path: Path) -> None:
    """A vocabulary that was cut while the config was forgotten."""
    model = FAMILIES["llama-tied"]()
    model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight.data[:48].clone())
    model.lm_head.weight = model.model.embed_tokens.weight
    reloaded = reload(saved(model, tmp_path), AutoModelForCausalLM)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert torch.equal(output_of(reloaded), output_of(model))


def test_deepcopy(tmp_path: Path) -> None:
    reloaded = reload(saved(FAMILIES["llama"](), tmp_path), AutoModelForCausalLM)
    twin = copy.deepcopy(reloaded)
    assert torch.equal(output_of(twin), output_of(reloaded))
    twin.save_pretrained(tmp_path / "twin")
    assert torch.equal(output_of(reload(tmp_path / "twin", AutoModelForCausalLM)), output_of(reloaded))


def test_export(tmp_path: Path) -> None:
    reloaded = reload(saved(FAMILIES["llama"](), tmp_path), AutoModelForCausalLM)
    program = torch.export.export(reloaded, (TOKENS,), {"use_cache": False}, strict=False)
    torch.testing.assert_close(program.module()(TOKENS, use_cache=False).logits, output_of(reloaded))


def test_casting_is_allowed(tmp_path: Path) -> None:
    """Transformers forbids .half() and .float() on what it takes for a quantized model."""
    reloaded = reload(saved(FAMILIES["llama"](), tmp_path), AutoModelForCausalLM)
    assert reloaded.half().dtype == torch.float16
    assert reloaded.float().dtype == torch.float32


def test_mismatched_sizes_may_be_ignored_and_nothing_is_lost(tmp_path: Path) -> None:
    model = FAMILIES["bert"]()
    reloaded = reload(saved(model, tmp_path), type(model), ignore_mismatched_sizes=True)
    assert torch.equal(output_of(reloaded), output_of(model))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = saved(FAMILIES["bert"](), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="written by a newer hfcompress"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_record_of_another_architecture_is_refused() -> None:
    with pytest.raises(hfcompress.HFCompressError, match="BertForSequenceClassification has none of the 1 modules"):
        resize_(bert(), {"model.layers.0.mlp": {"out_features": 3}})


def test_dense_tensors_are_cut_but_cannot_grow() -> None:
    model, shapes = bert(), uneven_shapes(FAMILIES["bert"]())
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    resize_(model, shapes)
    assert uneven_shapes(model) == shapes != {}
    for key, value in model.state_dict().items():  # the first rows and columns stay
        assert torch.equal(value, whole[key][tuple(slice(size) for size in value.shape)]), key
    assert torch.isfinite(output_of(model)).all()
    with pytest.raises(hfcompress.HFCompressError, match=r"a?Linear's weight of shape \(40, 32\) cannot grow"):
        resize_(model, {"bert.encoder.layer.0.intermediate.dense": {"out_features": 48}})


def test_heads_that_only_their_number_tells(tmp_path: Path) -> None:
    """The queries of a whole model cut evenly, so that no config value says it: attributes must come along."""
    model = llama()
    for layer in model.model.layers:
        own = layer.self_attn
        keep_outputs(own.q_proj, rows([0, 2, 4, 6], 4))
        own.o_proj.weight = nn.Parameter(own.o_proj.weight.data[:, rows([0, 2, 4, 6], 4)].clone())
        own.num_key_value_groups = 1
    reloaded = reload(saved(model, tmp_path), AutoModelForCausalLM)
    assert reloaded.model.layers[1].self_attn.num_key_value_groups == 1
    assert torch.equal(output_of(reloaded), output_of(model))
