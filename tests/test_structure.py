"""Layer stacks are found in every family, and dropping layers gives the model that its config describes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
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
from tests.conftest import VOCABULARY_SIZE, tiny_bert, tiny_llama

LAYERS = 4
HIDDEN = 32


@dataclasses.dataclass(frozen=True)
class Family:
    """A tiny model of one architecture, and what is known of its stacks."""

    auto: Any
    config: Callable[[], hf.PreTrainedConfig]
    stacks: dict[str, int]
    linears_per_layer: tuple[int, ...]
    inputs: str = "tokens"

    def model(self) -> hf.PreTrainedModel:
        torch.manual_seed(0)
        model = self.auto.from_config(self.config())
        # Families initialise residual branches or norms to (nearly) nothing; noise makes every layer matter.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    @property
    def generates(self) -> bool:
        return self.auto is hf.AutoModelForCausalLM


def _config(kind: type, **options: Any) -> Callable[[], hf.PreTrainedConfig]:
    """Return a maker of configs of the common tiny size."""
    common = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 4,
        "eos_token_id": 5,
    }
    return lambda: kind(**{**common, **options})


def _decoder(kind: type, **options: Any) -> Callable[[], hf.PreTrainedConfig]:
    return _config(kind, **{"num_key_value_heads": 2, "head_dim": 8, **options})


CLASSIFIER, DECODER, SEQ2SEQ = hf.AutoModelForSequenceClassification, hf.AutoModelForCausalLM, hf.AutoModelForSeq2SeqLM
FAMILIES = {
    "bert": Family(CLASSIFIER, _config(hf.BertConfig), {"bert.encoder.layer": LAYERS}, (6,)),
    "roberta": Family(CLASSIFIER, _config(hf.RobertaConfig), {"roberta.encoder.layer": LAYERS}, (6,)),
    "electra": Family(
        CLASSIFIER, _config(hf.ElectraConfig, embedding_size=16), {"electra.encoder.layer": LAYERS}, (6,)
    ),
    "distilbert": Family(
        CLASSIFIER,
        lambda: hf.DistilBertConfig(
            vocab_size=VOCABULARY_SIZE, dim=HIDDEN, hidden_dim=48, n_layers=LAYERS, n_heads=4, pad_token_id=0
        ),
        {"distilbert.transformer.layer": LAYERS},
        (6,),
    ),
    "llama": Family(DECODER, _decoder(hf.LlamaConfig), {"model.layers": LAYERS}, (7,)),
    "qwen2": Family(
        DECODER,
        _decoder(hf.Qwen2Config, use_sliding_window=True, sliding_window=4, max_window_layers=2),
        {"model.layers": LAYERS},
        (7,),
    ),
    "qwen3": Family(DECODER, _decoder(hf.Qwen3Config), {"model.layers": LAYERS}, (7,)),
    "gemma3": Family(
        DECODER,
        _decoder(
            hf.Gemma3TextConfig,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        ),
        {"model.layers": LAYERS},
        (7,),
    ),
    "smollm3": Family(
        DECODER, _decoder(hf.SmolLM3Config, no_rope_layers=[1, 0, 0, 1]), {"model.layers": LAYERS}, (7,)
    ),
    "mistral": Family(DECODER, _decoder(hf.MistralConfig, sliding_window=4), {"model.layers": LAYERS}, (7,)),
    "phi3": Family(DECODER, _decoder(hf.Phi3Config), {"model.layers": LAYERS}, (4,)),
    "gpt2": Family(
        DECODER,
        lambda: hf.GPT2Config(
            vocab_size=VOCABULARY_SIZE,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=4,
            n_positions=64,
            bos_token_id=4,
            eos_token_id=5,
            pad_token_id=0,
        ),
        {"transformer.h": LAYERS},
        (4,),
    ),
    "gpt_neox": Family(DECODER, _config(hf.GPTNeoXConfig), {"gpt_neox.layers": LAYERS}, (4,)),
    "vit": Family(
        hf.AutoModelForImageClassification,
        _config(hf.ViTConfig, image_size=8, patch_size=4),
        {"vit.layers": LAYERS},
        (6,),
        "pixels",
    ),
    "bart": Family(
        SEQ2SEQ,
        lambda: hf.BartConfig(
            vocab_size=VOCABULARY_SIZE,
            d_model=HIDDEN,
            encoder_layers=LAYERS,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            pad_token_id=0,
            bos_token_id=4,
            eos_token_id=5,
            decoder_start_token_id=4,
            forced_eos_token_id=5,
        ),
        {"model.encoder.layers": LAYERS, "model.decoder.layers": 3},
        (6, 10),
    ),
    "t5": Family(
        SEQ2SEQ,
        lambda: hf.T5Config(
            vocab_size=VOCABULARY_SIZE,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=48,
            num_layers=LAYERS,
            num_decoder_layers=3,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=5,
            decoder_start_token_id=0,
        ),
        {"encoder.block": LAYERS, "decoder.block": 3},
        (6, 10),
    ),
    "whisper": Family(
        hf.AutoModelForSpeechSeq2Seq,
        lambda: hf.WhisperConfig(
            vocab_size=VOCABULARY_SIZE,
            num_mel_bins=8,
            d_model=HIDDEN,
            encoder_layers=LAYERS,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=16,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=4,
            eos_token_id=5,
            decoder_start_token_id=4,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        {"model.encoder.layers": LAYERS, "model.decoder.layers": 3},
        (6, 10),
    ),
    "clip": Family(
        hf.AutoModel,
        lambda: hf.CLIPConfig(
            text_config={
                "vocab_size": VOCABULARY_SIZE,
                "hidden_size": HIDDEN,
                "intermediate_size": 48,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "max_position_embeddings": 16,
                "pad_token_id": 0,
                "bos_token_id": 4,
                "eos_token_id": 5,
            },
            vision_config={
                "hidden_size": HIDDEN,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": 8,
                "patch_size": 4,
            },
            projection_dim=16,
        ),
        {"text_model.encoder.layers": LAYERS, "vision_model.encoder.layers": 3},
        (6, 6),
    ),
    "modernbert": Family(
        CLASSIFIER,
        _config(
            hf.ModernBertConfig,
            local_attention=4,
            cls_token_id=2,
            sep_token_id=3,
            layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        ),
        {"model.layers": LAYERS},
        (4,),
    ),
    "deberta_v2": Family(
        CLASSIFIER,
        _config(hf.DebertaV2Config, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8),
        {"deberta.encoder.layer": LAYERS},
        (8,),
    ),
}
ONE_STACK = [name for name, family in FAMILIES.items() if len(family.stacks) == 1]
TWO_STACKS = [name for name, family in FAMILIES.items() if len(family.stacks) == 2]


def _inputs(family: Family) -> dict[str, Tensor]:
    if family.inputs == "pixels":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    ids = torch.randint(6, VOCABULARY_SIZE, (2, 10), generator=torch.Generator().manual_seed(1))
    attention = torch.ones_like(ids)
    attention[1, 7:] = 0
    ids[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": attention}


@torch.no_grad()
def _logits(model: hf.PreTrainedModel, family: Family) -> Tensor:
    inputs = _inputs(family)
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
    prompt = _inputs(family)["input_ids"][:1]
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


def _fingerprint(model: hf.PreTrainedModel) -> tuple[list[str], dict, list]:
    indices = [module.layer_idx for module in model.modules() if hasattr(module, "layer_idx")]
    return list(model.state_dict()), copy.deepcopy(model.config.to_dict()), indices


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
