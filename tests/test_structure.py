"""Layer stacks are found in every family, and dropping layers gives the model that its config describes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import ModelError
from hfcompress.structure import DropLayers, drop_layers, layer_stacks, stack_linears
from tests.conftest import tiny_bert, tiny_llama
from tests.families import FAMILIES, LAYERS, Family, inputs_of

ONE_STACK = [name for name, family in FAMILIES.items() if len(family.stacks) == 1]
TWO_STACKS = [name for name, family in FAMILIES.items() if len(family.stacks) == 2]


@torch.no_grad()
def _logits(model: hf.PreTrainedModel, family: Family) -> Tensor:
    inputs = inputs_of(family)
    logits = model(**inputs).logits
    return logits[inputs["attention_mask"].bool()] if family.generates else logits


def _bypass(stack: nn.ModuleList, dropped: list[int]) -> None:
    """Make the dropped layers hand their input on, which is what dropping means."""

    def identity(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for index in dropped:
        stack[index].register_forward_hook(identity, with_kwargs=True)


KEPT = {
    "even": (DropLayers(keep=2), [0, 3]),
    "first": (DropLayers(keep=2, select="first"), [0, 1]),
    "last": (DropLayers(keep=2, select="last"), [2, 3]),
    "explicit": (DropLayers(layers=(0, 2)), [0, 2]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_stacks_and_their_linears_are_found(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    assert {stack.name: len(stack) for stack in layer_stacks(model)} == family.stacks
    found = stack_linears(model)
    for (stack, length), count in zip(family.stacks.items(), family.linears_per_layer):
        for index in range(length):
            assert len([one for one in found if one.startswith(f"{stack}.{index}.")]) == count
    assert len(found) == sum(length * n for length, n in zip(family.stacks.values(), family.linears_per_layer))
    assert all(module is model.get_submodule(full_name) for full_name, module in found.items())
    if name == "gpt2":
        assert all(isinstance(module, Conv1D) for module in found.values())


def test_model_without_a_stack_is_refused() -> None:
    with pytest.raises(ModelError, match="Sequential has no stack of alike layers"):
        layer_stacks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_stack_inside_a_layer_is_part_of_the_layer() -> None:
    # experts, as mixtures of them hold
    experts = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))}) for _ in range(2)]
    model = nn.ModuleDict({"layers": nn.ModuleList(experts)})
    assert [(stack.name, len(stack)) for stack in layer_stacks(model)] == [("layers", 2)]
    assert list(stack_linears(model)) == [
        f"layers.{layer}.experts.{expert}" for layer in (0, 1) for expert in range(3)
    ]


# modernbert's first layer alone has no norm before attention, so no other can come first
@pytest.mark.parametrize(
    ("name", "selection"),
    [(name, selection) for name in ONE_STACK for selection in KEPT if (name, selection) != ("modernbert", "last")],
)
def test_dropped_layers_are_bypassed_and_the_config_says_so(name: str, selection: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    method, kept = KEPT[selection]
    model = family.model()
    full = _logits(model, family)
    reference = family.model()
    _bypass(reference.get_submodule(next(iter(family.stacks))), [i for i in range(LAYERS) if i not in kept])
    expected = _logits(reference, family)
    assert not torch.allclose(full, expected, atol=1e-2)

    assert drop_layers(model, method) == kept
    assert torch.equal(_logits(model, family), expected)
    assert model.config.num_hidden_layers == 2
    assert len(layer_stacks(model)[0]) == 2

    model.save_pretrained(tmp_path)
    reloaded, notes = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(_logits(reloaded, family), expected)


@pytest.mark.parametrize("name", [name for name in ONE_STACK if FAMILIES[name].generates])
def test_generation_with_cache_equals_generation_without(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    drop_layers(model, DropLayers(layers=(1, 3)))
    prompt = inputs_of(family)["input_ids"][:1]
    options = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    cached = model.generate(prompt, use_cache=True, **options)
    plain = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    filled = [layer.get_seq_length() > 0 for layer in cached.past_key_values.layers]
    assert filled == [True, True]


@pytest.mark.parametrize(
    ("name", "attribute", "expected"),
    [
        ("gemma3", "layer_types", ["full_attention", "full_attention"]),
        ("smollm3", "no_rope_layers", [0, 1]),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_per_layer_lists_of_the_config_follow_the_layers(name: str, attribute: str, expected: list) -> None:
    model = FAMILIES[name].model()
    drop_layers(model, DropLayers(layers=(1, 3)))
    assert getattr(model.config, attribute) == expected


def test_lists_that_only_happen_to_be_as_long_as_the_stack_stay() -> None:
    model = tiny_llama(layers=3, eos_token_id=[5, 7, 9])
    drop_layers(model, DropLayers(keep=1))
    assert model.config.eos_token_id == [5, 7, 9]
    deberta = hf.DebertaV2Model(FAMILIES["deberta_v2"].config())
    deberta.config.num_hidden_layers = 2
    deberta = hf.DebertaV2Model(deberta.config)
    drop_layers(deberta, DropLayers(keep=1))
    assert deberta.config.pos_att_type == ["c2p", "p2c"]


def _fingerprint(model: hf.PreTrainedModel) -> tuple[list[str], dict, dict]:
    plain = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, float))
    }
    return list(model.state_dict()), copy.deepcopy(model.config.to_dict()), plain


def _refused(model: hf.PreTrainedModel, method: DropLayers, message: str) -> None:
    """Check that the method is refused and the model left as it was."""
    before = _fingerprint(model)
    with pytest.raises(ModelError, match=message):
        drop_layers(model, method)
    assert _fingerprint(model) == before


@pytest.mark.parametrize("name", TWO_STACKS)
def test_two_stacks_are_refused_by_name(name: str) -> None:
    first, second = FAMILIES[name].stacks
    pattern = rf"2 layer stacks \({first} \(4\), {second} \(3\)\)"
    _refused(FAMILIES[name].model(), DropLayers(keep=2), pattern)


def test_more_layers_than_there_are_is_refused() -> None:
    _refused(tiny_llama(), DropLayers(keep=3), "keep=3: the stack has only 2 layers")
    _refused(tiny_llama(), DropLayers(layers=(0, 2)), r"layers 0 to 1, no \[2\]")


def test_layer_that_cannot_move_is_refused() -> None:
    # reloaded, layer 2 would lose its attention norm: other logits and no error
    _refused(FAMILIES["modernbert"].model(), DropLayers(keep=2, select="last"), "layer 2 cannot become layer 0")


def _noisy(config: hf.PreTrainedConfig, auto: Any = hf.AutoModelForCausalLM) -> hf.PreTrainedModel:
    return Family(auto, lambda: config, {}, ()).model()


def _gpt_neo() -> hf.PreTrainedModel:
    tokens = {"vocab_size": 64, "bos_token_id": 4, "eos_token_id": 5}
    kinds = [[["global", "local"], 2]]
    return _noisy(
        hf.GPTNeoConfig(hidden_size=32, num_layers=4, num_heads=4, attention_types=kinds, window_size=4, **tokens)
    )


@pytest.mark.parametrize("kept", [(0, 2), (1, 3), (1, 2)])
@torch.no_grad()
def test_layers_that_call_their_place_by_another_name_are_renumbered(kept: tuple[int, ...], tmp_path: Path) -> None:
    model, reference = _gpt_neo(), _gpt_neo()  # its attentions find their keys in the cache by layer_id
    _bypass(reference.transformer.h, [index for index in range(4) if index not in kept])
    inputs = {"input_ids": torch.arange(6, 16)[None]}
    expected = reference(**inputs, use_cache=False).logits
    drop_layers(model, DropLayers(layers=kept))
    assert [block.attn.attention.layer_id for block in model.transformer.h] == [0, 1]
    outputs = model(**inputs, use_cache=True)
    assert torch.equal(outputs.logits, expected)
    assert [layer.get_seq_length() for layer in outputs.past_key_values.layers] == [10, 10]
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(**inputs).logits, expected)


@torch.no_grad()
def test_layers_that_compute_with_their_place_are_refused_elsewhere(tmp_path: Path) -> None:
    config = hf.DiffLlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = _noisy(config)
    message = r"layer 2 of 4 cannot become layer 1 of 2, .*self_attn\.lambda_init is 0\.47.* would be 0\.35"
    _refused(model, DropLayers(layers=(0, 2)), message)
    drop_layers(model, DropLayers(keep=2, select="first"))
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.arange(6, 16)[None]}
    assert torch.equal(type(model).from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits)


def test_layers_that_compute_with_their_number_are_refused() -> None:
    class Scaled(hf.LlamaForCausalLM):
        def __init__(self, config: hf.LlamaConfig) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.residual_scale = config.num_hidden_layers**-0.5

    config = FAMILIES["llama"].config()
    message = r"layer 0 of 4 cannot become layer 0 of 1, .*residual_scale is 0\.5 and would be 1\.0\.$"
    _refused(Scaled(config), DropLayers(keep=1), message)


def test_what_sums_up_the_layers_follows_them() -> None:
    model = FAMILIES["qwen2"].model()
    drop_layers(model, DropLayers(layers=(0, 1)))
    assert set(model.config.layer_types) == {"full_attention"}
    assert model.model.has_sliding_layers is False


def test_layers_keep_their_own_rate_of_stochastic_depth() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}
    model = _noisy(hf.BeitConfig(**sizes, intermediate_size=48, drop_path_rate=0.3), hf.AutoModel)
    drop_layers(model, DropLayers(layers=(1, 3)))
    (stack,) = layer_stacks(model)
    assert [round(layer.drop_path.drop_prob, 3) for layer in stack.layers] == [0.1, 0.3]


@pytest.mark.parametrize("kept", [(0, 1), (1, 3)])
@torch.no_grad()
def test_stages_of_a_backbone_are_counted_anew(kept: tuple[int, ...], tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}
    model = _noisy(hf.Dinov2Config(**sizes), hf.AutoModelForImageClassification)
    drop_layers(model, DropLayers(layers=kept))
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert reloaded.config.out_features == ["stage2"]
    inputs = {"pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    assert torch.equal(reloaded(**inputs).logits, model(**inputs).logits)


def test_a_stage_that_a_backbone_gives_out_cannot_go() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}
    model = _noisy(hf.Dinov2Config(**sizes, out_features=["stage2", "stage4"]), hf.AutoModel)
    _refused(model, DropLayers(layers=(0, 3)), "cannot say which layers stay, .*out_features must be a subset")


def test_config_without_a_layer_count_is_refused() -> None:
    model = tiny_bert(layers=2)
    model.config.num_hidden_layers = 5
    _refused(model, DropLayers(keep=1), "num_hidden_layers is 5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either keep"),
        ({"keep": 2, "layers": (0, 1)}, "give either keep"),
        ({"keep": 0}, "greater than or equal to 1"),
        ({"layers": (1, 0)}, "rising order"),
        ({"layers": (1, 1)}, "distinct"),
        ({"layers": (-1, 1)}, "greater than or equal to 0"),
        ({"keep": 2, "select": "middle"}, "'even', 'first', 'last', 'angular' or 'loss'"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        DropLayers(**options)


@pytest.mark.parametrize(
    ("total", "keep", "kept"), [(12, 6, [0, 2, 4, 7, 9, 11]), (6, 1, [0]), (5, 3, [0, 2, 4]), (3, 3, [0, 1, 2])]
)
def test_even_selection_keeps_the_ends(total: int, keep: int, kept: list[int]) -> None:
    assert drop_layers(tiny_bert(layers=total), DropLayers(keep=keep)) == kept
