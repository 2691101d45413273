"""Heads and neurons are found in every family from one run, whatever the weights, the dtype and the mode are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn

from hfcompress.errors import ModelError
from hfcompress.structure import LINEAR_TYPES, AttentionSite, FfnSite, find_attention, find_ffn
from tests.conftest import VOCABULARY_SIZE, tiny_bert
from tests.families import FAMILIES, inputs_of

# attentions, query heads, key/value heads, layout; blocks, width, rows per neuron of each producer
SEPARATE, CONCATENATED, INTERLEAVED = "separate", "concatenated", "interleaved"
ENCODER = ((4, 4, 4, SEPARATE), (4, 48, [1]))
GROUPED = ((4, 4, 2, SEPARATE), (4, 48, [1, 1]))
ENCODER_DECODER = ((10, 4, 4, SEPARATE), (7, 48, [1]))
EXPECTED = {
    **dict.fromkeys(["bert", "roberta", "electra", "distilbert", "vit", "deberta_v2"], ENCODER),
    **dict.fromkeys(["llama", "qwen2", "qwen3", "gemma3", "smollm3", "mistral"], GROUPED),
    **dict.fromkeys(["bart", "t5", "whisper"], ENCODER_DECODER),
    "clip": ((7, 4, 4, SEPARATE), (7, 48, [1])),
    "phi3": ((4, 4, 2, CONCATENATED), (4, 48, [2])),
    "modernbert": ((4, 4, 4, CONCATENATED), (4, 48, [2])),
    "gpt2": ((4, 4, 4, CONCATENATED), (4, 128, [1])),
    "gpt_neox": ((4, 4, 4, INTERLEAVED), (4, 48, [1])),
}
DECODERS = [name for name, family in FAMILIES.items() if family.generates]


def _sites(model: hf.PreTrainedModel) -> list[tuple]:
    """Everything that was found, as plain values that can be compared."""

    def plain(value: object) -> object:
        if isinstance(value, (AttentionSite, FfnSite)):
            return tuple(plain(part) for part in vars(value).values())
        if isinstance(value, tuple):
            return tuple(plain(part) for part in value)
        return (value.name, value.features.tolist()) if hasattr(value, "features") else value

    return [plain(site) for site in (*find_attention(model), *find_ffn(model))]  # type: ignore[misc]


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_and_neurons_of_every_family(name: str) -> None:
    model = FAMILIES[name].model()
    attention, ffn = find_attention(model), find_ffn(model)
    heads, neurons = EXPECTED[name]
    assert {(site.heads, site.key_value_heads, site.layout) for site in attention} == {heads[1:]}
    assert {(site.width, tuple(up.features.shape[1] for up in site.ups)) for site in ffn} == {
        (neurons[1], tuple(neurons[2]))
    }
    assert {site.head_dim for site in attention} == {8}
    assert (len(attention), len(ffn)) == (heads[0], neurons[0])
    layers = {(stack, index) for stack, count in FAMILIES[name].stacks.items() for index in range(count)}
    assert {site.layer for site in attention} == {site.layer for site in ffn} == layers
    assert all(isinstance(model.get_submodule(site.name), nn.Module) for site in (*attention, *ffn))


@pytest.mark.parametrize("name", FAMILIES)
def test_zero_weights_and_low_precision_hide_nothing(name: str) -> None:
    model = FAMILIES[name].model()
    expected = _sites(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LINEAR_TYPES):
                for parameter in module.parameters():
                    parameter.zero_()
    assert _sites(model.to(torch.bfloat16)) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_finding_leaves_the_model_as_it_was(name: str) -> None:
    family = FAMILIES[name]
    model = family.model().train()
    model.get_submodule(next(iter(family.stacks)))[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    configs = [getattr(module, "config", None) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    implementation, said, random = model.config._attn_implementation, model.config.to_dict(), torch.get_rng_state()
    find_attention(model)
    find_ffn(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert modes == [module.training for module in model.modules()]
    assert all(a is b for a, b in zip(configs, [getattr(module, "config", None) for module in model.modules()]))
    assert attributes == [set(vars(module)) for module in model.modules()]
    assert (model.config._attn_implementation, model.config.to_dict()) == (implementation, said)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sub_models_keep_their_own_attention_implementation() -> None:
    model = FAMILIES["clip"].model()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    find_attention(model)
    found = model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation
    assert found == ("eager", "sdpa")


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_means_that_generation_keeps_the_keys(name: str) -> None:
    family = FAMILIES[name]
    cached = {site.name for site in find_attention(family.model()) if site.cached}
    every = {site.name for site in find_attention(family.model())}
    decoder = {one for one in every if family.generates or "decoder" in one}
    assert cached == decoder


def test_attentions_with_one_position_bias_are_tied_to_the_first() -> None:
    sites = {site.name: site for site in find_attention(FAMILIES["t5"].model())}
    for name, site in sites.items():
        first = ".".join("0" if part.isdigit() and place == 2 else part for place, part in enumerate(name.split(".")))
        assert site.same_heads_as == (None if first == name else first)
        has_table = name in ("encoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.0.SelfAttention")
        assert [part.name for part in site.extra] == ([f"{name}.relative_attention_bias"] if has_table else [])


def test_head_counts_that_the_forward_reads_from_the_config() -> None:
    reads = {name: find_attention(FAMILIES[name].model())[0].config_counts for name in FAMILIES}
    assert {name: counts for name, counts in reads.items() if counts} == {"phi3": ("num_attention_heads",)}


def test_own_inputs_are_used() -> None:
    family = FAMILIES["whisper"]
    assert len(find_attention(family.model(), inputs_of(family))) == 10


def test_shared_layers_are_found_once() -> None:
    config = hf.AlbertConfig(
        vocab_size=VOCABULARY_SIZE, embedding_size=16, hidden_size=32, num_attention_heads=4, intermediate_size=48
    )
    model = hf.AutoModel.from_config(config)
    assert [site.heads for site in find_attention(model)] == [4]
    assert [site.width for site in find_ffn(model)] == [48]


def _small(kind: type, **options: object) -> Callable[[], hf.PreTrainedModel]:
    common = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return lambda: hf.AutoModelForCausalLM.from_config(kind(**{**common, **options}))


@pytest.mark.parametrize(
    ("model", "find", "message"),
    [
        (_small(hf.Olmo2Config), find_attention, "q_proj cannot be cut by heads: one of its features acts on several"),
        (_small(hf.MambaConfig), find_attention, "runs no attention through Transformers' attention interface"),
        (_small(hf.MambaConfig), find_ffn, "no feed-forward block of linear layers"),
        (_small(hf.MixtralConfig, num_local_experts=2), find_ffn, "no feed-forward block of linear layers"),
    ],
)
def test_what_cannot_be_found_is_refused_with_the_reason(
    model: Callable[[], hf.PreTrainedModel], find: Callable, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        find(model())


class _NormBeforeDown(nn.Module):
    """A feed-forward block whose neurons are mixed by a norm before they are read."""

    def __init__(self, up: nn.Linear, norm: nn.Module, down: nn.Linear) -> None:
        super().__init__()
        self.up, self.norm, self.down = up, norm, down

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(torch.relu(self.up(hidden))))


def test_neurons_mixed_before_they_are_read_are_no_neurons() -> None:
    class Output(nn.Module):
        def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return hidden + residual

    for norm, found in ((nn.Identity(), 2), (nn.LayerNorm(64), 1)):
        model = tiny_bert(layers=2)
        layer = model.bert.encoder.layer[0]
        layer.intermediate = _NormBeforeDown(nn.Linear(32, 64), norm, nn.Linear(64, 32))
        layer.output = Output()
        assert len(find_ffn(model)) == found


def test_a_model_that_cannot_run_says_so() -> None:
    with pytest.raises(ModelError, match=r"BertForSequenceClassification could not run on input_ids.*inputs=\.\.\."):
        find_attention(tiny_bert(), {"input_ids": torch.full((1, 8), VOCABULARY_SIZE + 1)})
