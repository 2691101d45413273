"""A shrunk model computes what the gated model computed, in every family, and its config says what it can."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from hfcompress.errors import ModelError
from hfcompress.quantization import RTN, quantize
from hfcompress.structure import (
    AttentionSite,
    FfnSite,
    Gates,
    ShrinkReport,
    attach_gates,
    closed_heads,
    closed_neurons,
    find_attention,
    find_ffn,
    plan_heads,
    shrink,
    zero_heads_,
    zero_neurons_,
)
from tests.conftest import tiny_bert, tiny_llama
from tests.families import FAMILIES, inputs_of

EMPTY = 1  # the layer of each stack that loses every head and every neuron
TO_TEXT = (hf.AutoModelForSeq2SeqLM, hf.AutoModelForSpeechSeq2Seq)
GENERATES = [name for name, family in FAMILIES.items() if family.generates or family.auto in TO_TEXT]
CACHES: list[dict[str, Any]] = [{"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"}]
GROUPED = {"num_attention_heads": 2, "num_key_value_heads": 1}
CONFIG_HAS_HEADS = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma3", "smollm3", "mistral", "phi3"), GROUPED),
    "vit": {"num_attention_heads": 2, "head_dim": 8},
    "t5": {"num_heads": 2},
}
CONFIG_WIDTHS = {
    **dict.fromkeys(FAMILIES, ("intermediate_size",)),
    "distilbert": ("hidden_dim",),
    "gpt2": ("n_inner",),
    "t5": ("d_ff",),
    "bart": ("encoder_ffn_dim", "decoder_ffn_dim"),
    "whisper": ("encoder_ffn_dim", "decoder_ffn_dim"),
    "clip": ("text_config.intermediate_size", "vision_config.intermediate_size"),
}


def _index(site: AttentionSite | FfnSite) -> int:
    assert site.layer is not None
    return site.layer[1]


def _uneven(model: hf.PreTrainedModel) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Choose heads and neurons to close: another number in each layer, all of them in layer EMPTY."""
    chosen = random.Random(7)
    heads, neurons = {}, {}
    for site in find_attention(model):
        count = site.heads if _index(site) == EMPTY else chosen.randint(1, site.heads - 1)
        heads[site.name] = sorted(chosen.sample(range(site.heads), count))
        if _index(site) == 0:  # a whole key/value group
            heads[site.name] = list(range(site.group_size))
    for block in find_ffn(model):
        count = block.width if _index(block) == EMPTY else chosen.randint(1, block.width - 1)
        neurons[block.name] = sorted(chosen.sample(range(block.width), count))
    return heads, neurons


def _even(model: hf.PreTrainedModel) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Choose the second half of the heads, and twenty neurons, in every layer."""
    heads = {site.name: list(range(site.heads // 2, site.heads)) for site in find_attention(model)}
    return heads, {block.name: list(range(3, 23)) for block in find_ffn(model)}


def _gated(model: hf.PreTrainedModel, choice: Callable[[Any], tuple[dict, dict]]) -> Gates:
    heads, neurons = choice(model)
    gates = attach_gates(model, find_attention(model), find_ffn(model))
    for name, closed in heads.items():
        gates.heads[name].close_(closed)
    for name, closed in neurons.items():
        gates.neurons[name].close_(closed)
    return gates


def _logits(model: hf.PreTrainedModel, name: str) -> Tensor:
    outputs = model(**inputs_of(FAMILIES[name]))
    # CLIP's similarities are large; its embeddings say as much at the scale of one.
    return torch.cat([outputs.text_embeds, outputs.image_embeds]) if name == "clip" else outputs.logits


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def _expected_heads(sites: list[AttentionSite], closed: dict[str, list[int]], name: str) -> dict[str, tuple[int, int]]:
    """Count by the documented rules, apart from the code: (query, key/value) heads that stay per attention."""
    left = {site.name: set(range(site.heads)) - set(closed[site.name]) for site in sites}
    counts = {}
    for site in sites:
        tied = [one.name for one in sites if (one.same_heads_as or one.name) == (site.same_heads_as or site.name)]
        open_heads = set().union(*(left[one] for one in tied))
        per_group = [
            sum(head // site.group_size == group for head in open_heads) for group in range(site.key_value_heads)
        ]
        groups, most = sum(count > 0 for count in per_group), max(per_group)
        # DeBERTa and Whisper view by the number of heads, and a cache counts tokens by keys: one closed head stays
        if not groups and (site.cached or name in ("deberta_v2", "whisper")):
            groups = most = 1
        counts[site.name] = groups * most, groups
    if name == "phi3":
        queries = [heads // groups for heads, groups in counts.values()]
        groups = max(groups for _, groups in counts.values())
        counts = dict.fromkeys(counts, (groups * max(queries), groups))
    return counts


def _modules_unlike_their_config(model: hf.PreTrainedModel) -> set[str]:
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        built = type(model)(config).state_dict()
    return {key.rpartition(".")[0] for key, value in model.state_dict().items() if value.shape != built[key].shape}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_gated_logits_are_shrunk_logits(name: str, implementation: str) -> None:
    model = FAMILIES[name].model()
    if name != "deberta_v2":
        model.set_attn_implementation(implementation)
    dense, sites, blocks = _logits(model, name), find_attention(model), find_ffn(model)
    heads, neurons = _uneven(model)
    _gated(model, _uneven)
    gated = _logits(model, name)
    assert not torch.allclose(dense, gated, atol=1e-3)

    report = shrink(model)
    _close(_logits(model, name), gated)
    kept = {site: (report.heads[site][1], report.key_value_heads[site][1]) for site in report.heads}
    assert kept == _expected_heads(sites, heads, name)
    least = int(name == "gpt2")  # Conv1D needs an input
    assert {block: after for block, (_, after) in report.neurons.items()} == {
        block.name: max(least, block.width - len(neurons[block.name])) for block in blocks
    }
    assert report.parameters[1] == sum(parameter.numel() for parameter in model.parameters()) < report.parameters[0]
    assert {one.split(":")[0] for one in report.uneven} >= _modules_unlike_their_config(model) != set()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_shrunk_modules_hold_what_the_report_counts(name: str) -> None:
    model = FAMILIES[name].model()
    _gated(model, _even)
    report = shrink(model)
    assert {site.name: site.heads for site in find_attention(model)} == {k: v for k, (_, v) in report.heads.items()}
    assert {block.name: block.width for block in find_ffn(model)} == {k: v for k, (_, v) in report.neurons.items()}
    assert {(site.heads, site.key_value_heads) for site in find_attention(model)} == {
        (2, 1 if FAMILIES[name].generates and name not in ("gpt2", "gpt_neox") else 2)
    }
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)


@pytest.mark.parametrize("name", FAMILIES)
def test_shrinking_twice_changes_nothing(name: str) -> None:
    model = FAMILIES[name].model()
    _gated(model, _uneven)
    first = shrink(model)
    weights, said = {key: value.clone() for key, value in model.state_dict().items()}, model.config.to_dict()
    second = shrink(model)
    assert (second.removed_heads, second.removed_neurons) == (0, 0)
    assert second.parameters == (first.parameters[1], first.parameters[1])
    assert {name: after for name, (after, _) in second.heads.items()} == {k: v for k, (_, v) in first.heads.items()}
    assert model.config.to_dict() == said
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_even_sizes_are_said_in_the_config_where_it_can_say_them(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].model()
    width = find_ffn(model)[0].width - 20
    _gated(model, _even)
    report = shrink(model)
    assert report.config == {**dict.fromkeys(CONFIG_WIDTHS[name], width), **CONFIG_HAS_HEADS.get(name, {})}
    assert (report.uneven == ()) == (name in CONFIG_HAS_HEADS)
    if name in CONFIG_HAS_HEADS:
        model.save_pretrained(tmp_path)
        reloaded = type(model).from_pretrained(tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(_logits(reloaded, name), _logits(model, name))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2", "mistral"])
@torch.no_grad()
def test_head_counts_that_a_config_refuses_are_left_to_the_loader(name: str, tmp_path: Path) -> None:
    # Llama's and Gemma's configs refuse, when they are saved, a hidden size that the head count does not divide.
    config = FAMILIES[name].config()
    config.update({"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4})
    model = FAMILIES[name].auto.from_config(config).eval()
    for site in find_attention(model):
        zero_heads_(model, site, [2, 3])  # a whole key/value group
    report = shrink(model)
    assert {kept for _, kept in report.heads.values()} == {6}
    plain = name in ("qwen2", "mistral")
    assert report.config == ({"num_attention_heads": 6, "num_key_value_heads": 3} if plain else {})
    assert bool(report.uneven) != plain
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(_logits(reloaded, name), _logits(model, name))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_has_the_gradients_of_the_gated_model(name: str) -> None:
    model = FAMILIES[name].model()
    gated = copy.deepcopy(model)
    _gated(gated, _uneven)
    _gated(model, _uneven)
    shrink(model)
    gradients = []
    for one in (gated, model):
        _logits(one, name).square().sum().backward()
        gradients.append({key: parameter.grad for key, parameter in one.named_parameters()})
    whole, cut = gradients
    # closed heads that stay are columns of zeros, which learn; gated columns do not
    readers = {f"{site.output.name}.weight" for site in find_attention(model)}
    shapes = {key: parameter.shape for key, parameter in gated.named_parameters() if key not in readers}
    same = [key for key in cut if cut[key] is not None and cut[key].shape == shapes.get(key)]
    assert len(same) >= len(cut) // 3
    for key in same:
        torch.testing.assert_close(cut[key], whole[key], rtol=1e-3, atol=1e-4 * float(whole[key].abs().max()) + 1e-6)
    with torch.no_grad():
        before = _logits(model, name)
        torch.optim.AdamW(model.parameters(), lr=1e-3).step()
        after = _logits(model, name)
    assert torch.isfinite(after).all()
    assert not torch.allclose(after, before, atol=1e-4)
    assert all((cut[key] is None) == (whole[key] is None) for key in cut)


def _generated(model: hf.PreTrainedModel, name: str, **more: Any) -> tuple[Tensor, Tensor]:
    """Return six tokens that follow, without any chance, and their logits."""
    inputs = inputs_of(FAMILIES[name])[model.main_input_name][:1]
    options = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    outputs = model.generate(inputs, **options, **more)
    return outputs.sequences, torch.stack(outputs.logits)


@pytest.mark.parametrize("name", GENERATES)
@torch.no_grad()
def test_generation_with_every_cache_is_that_of_the_gated_model(name: str) -> None:
    model = FAMILIES[name].model()
    gates = _gated(model, _uneven)
    expected, logits = _generated(model, name, use_cache=False)
    shrink(model)
    for more in CACHES:
        sequences, found = _generated(model, name, **more)
        assert torch.equal(sequences, expected), more
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert not any(gate.module._forward_pre_hooks for gate in gates.heads.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_zeros_in_the_weights_say_what_is_closed(name: str) -> None:
    model = FAMILIES[name].model()
    heads, neurons = _uneven(model)
    gated = copy.deepcopy(model)
    _gated(gated, _uneven)
    for site in find_attention(model):
        assert not closed_heads(model, site).any()
        zero_heads_(model, site, heads[site.name])
    for block in find_ffn(model):
        zero_neurons_(model, block, neurons[block.name])
    for site in find_attention(model):
        assert closed_heads(model, site).nonzero().flatten().tolist() == heads[site.name]
    for block in find_ffn(model):
        assert closed_neurons(model, block).nonzero().flatten().tolist() == neurons[block.name]
    with torch.no_grad():
        _close(_logits(model, name), _logits(gated, name))
        reports = shrink(model), shrink(gated)
        assert reports[0].heads == reports[1].heads
        assert reports[0].neurons == reports[1].neurons
        _close(_logits(model, name), _logits(gated, name))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gate_gradients_are_first_order_effects(name: str, implementation: str) -> None:
    # a gate scales the columns that read its head: dL/dgate = sum of weight times gradient over these columns
    model = FAMILIES[name].model()
    if name != "deberta_v2":
        model.set_attn_implementation(implementation)
    attention, ffn = find_attention(model), find_ffn(model)
    keys = set(model.state_dict())
    with attach_gates(model, attention, ffn) as gates:
        assert set(model.state_dict()) == keys
        _logits(model, name).square().sum().backward()
        parts = [(gates.heads[site.name], site.output) for site in attention]
        parts += [(gates.neurons[block.name], block.down) for block in ffn]
        assert len(parts) == len(attention) + len(ffn)
        for gate, part in parts:
            effect = gate.module.weight * gate.module.weight.grad  # type: ignore[operator]
            effect = effect if isinstance(gate.module, nn.Linear) else effect.T
            expected = effect.detach().sum(0)[part.features].sum(1)
            assert expected.abs().max() > 0
            torch.testing.assert_close(gate.values.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert not any(module._forward_pre_hooks for module in model.modules())


def _state(model: hf.PreTrainedModel) -> tuple[dict[str, Tensor], dict, list[set], int]:
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    numbers = [{pair for pair in vars(module).items() if isinstance(pair[1], int)} for module in model.modules()]
    return {key: value.clone() for key, value in model.state_dict().items()}, model.config.to_dict(), numbers, hooks


def _refused(model: hf.PreTrainedModel, message: str) -> None:
    """Check that shrinking is refused and the model left as it was, gates included."""
    before = _state(model)
    with pytest.raises(ModelError, match=message):
        shrink(model)
    after = _state(model)
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][key]) for key, value in before[0].items())


def test_a_model_keeps_a_head_and_a_neuron() -> None:
    model = tiny_llama()
    with attach_gates(model, find_attention(model)) as gates:
        for gate in gates.heads.values():
            gate.close_(range(4))
        _refused(model, "Every attention head of the model is closed")
    with attach_gates(model, ffn=find_ffn(model)) as gates:
        for gate in gates.neurons.values():
            gate.close_(range(128))
        _refused(model, "Every feed-forward neuron of the model is closed")


def test_an_architecture_that_fixes_its_heads_is_refused() -> None:
    # Swin adds a table of relative positions with one column per head, which is no linear layer and no embedding
    config = hf.SwinConfig(image_size=16, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4)
    model = hf.AutoModel.from_config(config).eval()
    attach_gates(model, find_attention(model)).heads["encoder.layers.0.blocks.1.attention"].close_([0])
    _refused(model, "SwinModel cannot run without its closed heads or neurons")


def test_tied_weights_are_refused() -> None:
    model = tiny_bert()
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    second.weight = first.weight
    attach_gates(model, ffn=find_ffn(model)).neurons["bert.encoder.layer.0.output.dense"].close_([1])
    _refused(model, r"layer\.0\.intermediate\.dense shares its weight with bert\.encoder\.layer\.1\.intermediate")


class _Codes(nn.Linear):
    """A linear layer with whole numbers for weights, as quantizers make them."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features)
        codes = (dense.weight.detach() * 100).round().to(torch.int8)
        codes[:, 3] = 0
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight / 100, self.bias)


def test_quantized_weights_are_refused() -> None:
    model = tiny_bert().eval()
    layer = model.bert.encoder.layer[0]
    layer.output.dense = _Codes(layer.output.dense)
    _refused(model, r"layer\.0\.output\.dense is quantized, so it cannot be cut; shrink the model before")


def test_packed_layers_are_refused_whatever_gates_say() -> None:
    model = FAMILIES["llama"].model()
    quantize(model, RTN(bits=8))
    blocks = find_ffn(model)
    attach_gates(model, ffn=blocks).neurons[blocks[0].name].close_([1])
    with pytest.raises(ModelError, match=r"is quantized, so it cannot be cut; shrink the model before"):
        shrink(model)


def test_a_gate_between_open_and_closed_is_multiplied_in() -> None:
    model = FAMILIES["gpt2"].model()
    gates = attach_gates(model, find_attention(model), find_ffn(model))
    with torch.no_grad():
        for gate in (*gates.heads.values(), *gates.neurons.values()):
            gate.values.uniform_(0.5, 1.5)
        gated = _logits(model, "gpt2")
        report = shrink(model)
        _close(_logits(model, "gpt2"), gated)
    assert (report.removed_heads, report.removed_neurons) == (0, 0)


def test_equal_numbers_per_group_keep_the_fewest_closed_heads() -> None:
    model = tiny_llama(hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
    site, other = find_attention(model)
    with attach_gates(model, [site]) as gates:
        gates.heads[site.name].close_([0, 1, 5])  # two of the first group, one of the second: one of each goes
        report = shrink(model)
    assert report.heads == {site.name: (8, 6), other.name: (8, 8)}
    assert report.key_value_heads == {site.name: (2, 2), other.name: (2, 2)}
    assert closed_heads(model, find_attention(model)[0]).tolist() == [True, False, False, False, False, False]


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_keeps_open_heads_in_equal_groups_and_no_more_than_needed(seed: int) -> None:
    random_closed = torch.Generator().manual_seed(seed)
    sites = find_attention(tiny_llama(layers=4, num_attention_heads=8, num_key_value_heads=4))
    closed = {site.name: torch.rand(8, generator=random_closed) < 0.6 for site in sites}
    for site in sites:
        kept = plan_heads(sites, closed)[site.name]
        opened = set((~closed[site.name]).nonzero().flatten().tolist())
        groups = [head // 2 for head in kept.units]
        assert opened <= set(kept.units)
        assert sorted(set(groups)) == list(kept.key_value_heads)
        assert len({groups.count(group) for group in kept.key_value_heads}) == 1
        per_group = [len(opened & {2 * group, 2 * group + 1}) for group in range(4)]
        assert len(kept.units) == max(1, sum(count > 0 for count in per_group)) * max(1, *per_group)


@torch.no_grad()
def test_a_first_layer_without_open_heads_still_counts_the_tokens_of_the_cache() -> None:
    # with no key/value head in layer 0, a dynamic cache would take itself for empty and positions would start anew
    model = tiny_llama(layers=2).eval()
    first = find_attention(model)[0]
    zero_heads_(model, first, range(first.heads))
    prompt = inputs_of(FAMILIES["llama"])["input_ids"][:1]
    expected = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=False)
    report = shrink(model)
    assert report.heads[first.name] == (4, 1)
    for more in ({"use_cache": True}, {"cache_implementation": "static"}):
        found = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, **more)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("wrong", [4, -1])
def test_units_that_are_not_there_are_refused(wrong: int) -> None:
    model = tiny_bert()
    site, block = find_attention(model)[0], find_ffn(model)[0]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    heads = rf"bert\.encoder\.layer\.0\.attention\..* has 4 units, numbered 0 to 3, no {wrong}\."
    with pytest.raises(ModelError, match=heads):
        zero_heads_(model, site, [0, wrong])
    with attach_gates(model, [site], [block]) as gates:
        for units in ([0, wrong], torch.tensor([0, wrong])):
            with pytest.raises(ModelError, match=heads):
                gates.heads[site.name].close_(units)
        with pytest.raises(ModelError, match=r"layer\.0\.output\.dense has .*, no -1, 100000\."):
            gates.neurons[block.name].close_([100_000, 1, -1])
        assert all(bool((gate.values == 1).all()) for gate in (*gates.heads.values(), *gates.neurons.values()))
    with pytest.raises(ModelError, match=r"layer\.0\.output\.dense has .*, no -1, 100000\."):
        zero_neurons_(model, block, [100_000, 1, -1])
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_a_mask_closes_the_units_where_it_is_true(kind: Callable[[list[bool]], Any]) -> None:
    model = FAMILIES["bert"].model()
    with attach_gates(model, find_attention(model)) as gates:
        gate = next(iter(gates.heads.values()))
        gate.close_(kind([False, True, False, True]))
        assert gate.values.tolist() == [1, 0, 1, 0]
        gate.close_(kind([False] * 4))
        assert gate.values.tolist() == [1, 0, 1, 0]
        with pytest.raises(ModelError, match="has 4 units, and the mask says something of 3"):
            gate.close_(kind([True, False, True]))


def test_frozen_weights_stay_frozen() -> None:
    model = tiny_bert().requires_grad_(False)
    attach_gates(model, find_attention(model)).heads["bert.encoder.layer.0.attention.self"].close_([0])
    assert shrink(model).removed_heads == 1
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_searched_is_reported() -> None:
    config = hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    model = hf.AutoModelForCausalLM.from_config(config)
    block = find_ffn(model)[0]
    zero_neurons_(model, block, [0, 1, 2])
    report: ShrinkReport = shrink(model)
    assert report.neurons[block.name] == (128, 125)
    assert report.heads == {}
    assert [reason.split(";")[0] for reason in report.not_searched] == [
        "BloomForCausalLM runs no attention through Transformers' attention interface, so its heads cannot be found"
    ]
