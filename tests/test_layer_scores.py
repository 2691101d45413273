"""Layers chosen by measurement: a layer that does nothing goes first, and what is measured is what dropping does."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from hfcompress.errors import DataError, HFCompressError, ModelError
from hfcompress.job import Job, Source
from hfcompress.recipe import parse_recipe
from hfcompress.stages import run_stage
from hfcompress.structure import DropLayers, drop_layers, layer_stacks, linear_weights_of
from hfcompress.structure.layer_scores import block_distances, least_loss_layers, skipping
from hfcompress.structure.layers import find_stack
from tests.conftest import VOCABULARY_SIZE, tiny_llama
from tests.families import FAMILIES as STRUCTURE_FAMILIES
from tests.families import inputs_of
from tests.runs import language_recipe, write_text

LAYERS = 4
SPECIAL = {"pad_token_id": 0, "bos_token_id": 4, "eos_token_id": 5}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
TEXT = {**SMALL, **SPECIAL, "vocab_size": VOCABULARY_SIZE, "max_position_embeddings": 64}
SEQ2SEQ = {
    **SPECIAL,
    "d_model": 32,
    "vocab_size": VOCABULARY_SIZE,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 4,
}
T5 = {"vocab_size": VOCABULARY_SIZE, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "decoder_start_token_id": 0}


@dataclasses.dataclass(frozen=True)
class Family:
    """A tiny model, which of its stacks is meant, what it is fed, and the field of its config that counts layers."""

    build: Callable[[], hf.PreTrainedModel]
    count: str
    stack: str | None = None
    inputs: str = "tokens"

    def model(self) -> hf.PreTrainedModel:
        """Return the model with layers that matter."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for stack in layer_stacks(model):
                for layer in stack.layers:
                    for linear in linear_weights_of(layer).values():
                        linear.weight.normal_(std=0.15)
        return model

    def batches(self, model: hf.PreTrainedModel | None = None) -> list[dict[str, Tensor]]:
        """Return two batches; tokens are labelled with what the model itself answers."""
        generator = torch.Generator().manual_seed(1)
        model, batches = model or self.model(), []
        for rows in (24, 16):
            ids = torch.randint(6, VOCABULARY_SIZE, (rows, 12), generator=generator)
            if self.inputs == "pixels":
                batch = {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
            elif self.inputs == "features":
                batch = {"input_features": torch.randn(rows, 4, 24, generator=generator), "decoder_input_ids": ids}
            else:
                mask = torch.ones_like(ids)
                mask[-1, 7:] = 0
                batch = {"input_ids": ids, "attention_mask": mask}
            if self.inputs == "both":
                batch["decoder_input_ids"] = ids.flip(1)
            with torch.no_grad():
                answer = model(**batch).logits.argmax(-1)
            if self.inputs == "tokens" and answer.dim() == 2:  # a decoder's labels are shifted by the model
                answer = torch.cat([answer[:, :1], answer[:, :-1]], 1).masked_fill(batch["attention_mask"] == 0, -100)
            if answer.dim() == 1:  # a random classifier gives all rows one class, which needs no layers
                answer = torch.arange(rows) % 5
            batches.append({**batch, "labels": answer})
        return batches


FAMILIES = {
    "bert": Family(lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, num_labels=5)), "num_hidden_layers"),
    "llama": Family(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)), "num_hidden_layers"),
    "gpt2": Family(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=VOCABULARY_SIZE, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, **SPECIAL)
        ),
        "n_layer",
    ),
    "vit": Family(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=5)),
        "num_hidden_layers",
        inputs="pixels",
    ),
    "bart-decoder": Family(
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ, encoder_layers=4, decoder_layers=4)),
        "decoder_layers",
        "decoder",
        "both",
    ),
    "bart-encoder": Family(
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ, encoder_layers=4, decoder_layers=4)),
        "encoder_layers",
        "encoder",
        "both",
    ),
    "t5-decoder": Family(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, num_layers=4, num_decoder_layers=4)),
        "num_decoder_layers",
        "decoder",
        "both",
    ),
    "t5-encoder": Family(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, num_layers=4, num_decoder_layers=2)),
        "num_layers",
        "encoder",
        "both",
    ),
    "whisper-decoder": Family(
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(**SEQ2SEQ, encoder_layers=2, decoder_layers=4, num_mel_bins=4, max_source_positions=12)
        ),
        "decoder_layers",
        "decoder",
        "features",
    ),
    "whisper-encoder": Family(
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(**SEQ2SEQ, encoder_layers=4, decoder_layers=2, num_mel_bins=4, max_source_positions=12)
        ),
        "encoder_layers",
        "encoder",
        "features",
    ),
    "clip": Family(
        lambda: hf.CLIPForImageClassification(
            hf.CLIPConfig(
                text_config={**TEXT, "num_hidden_layers": 2},
                vision_config={**SMALL, "image_size": 8, "patch_size": 4},
                projection_dim=16,
                num_labels=5,
            )
        ),
        "vision_config.num_hidden_layers",
        "vision_model",
        "pixels",
    ),
}
MEASURED = {
    "angular": {"select": "angular"},
    "loss": {"select": "loss"},
    "greedy": {"select": "loss", "greedy": True},
}


def _silence(layer: nn.Module) -> None:
    """Make a layer hand its input on: nothing comes out of its linear modules."""
    for linear in linear_weights_of(layer).values():
        nn.init.zeros_(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def _learn(model: hf.PreTrainedModel, batches: list[dict[str, Tensor]], idle: nn.Module) -> None:
    """Train the linear modules, except the idle layer's, on the labels, so that the loss needs every other layer."""
    linears = {id(linear): linear for linear in linear_weights_of(model).values()}
    for linear in linear_weights_of(idle).values():
        del linears[id(linear)]
    optimizer = torch.optim.Adam([linear.weight for linear in linears.values()], lr=3e-3)
    for batch in batches * 10:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@torch.no_grad()
def _logits(model: hf.PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("select", ["angular", "loss"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_that_does_nothing_is_the_first_to_go(name: str, select: str, index: int) -> None:
    family = FAMILIES[name]
    model = family.model()
    idle = find_stack(model, family.stack).layers[index]
    _silence(idle)
    batches = family.batches(model)
    if select == "loss":
        _learn(model, batches, idle)
    before = _logits(model, batches[0])
    kept = drop_layers(model, DropLayers(keep=LAYERS - 1, stack=family.stack, select=select), iter(batches))
    assert kept == [one for one in range(LAYERS) if one != index]
    torch.testing.assert_close(_logits(model, batches[0]), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_skipped_layer_is_a_dropped_layer_and_the_model_reloads(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model, batches = family.model(), family.batches()
    full = _logits(model, batches[0])
    stack = find_stack(model, family.stack)
    others = {one.name: len(one) for one in layer_stacks(model) if one.name != stack.name}
    with skipping([stack.layers[1], stack.layers[3]]):
        skipped = _logits(model, batches[0])
    assert torch.equal(_logits(model, batches[0]), full)
    assert not torch.allclose(skipped, full, atol=1e-2)

    drop_layers(model, DropLayers(layers=(0, 2), stack=family.stack))
    assert torch.equal(_logits(model, batches[0]), skipped)
    assert attrgetter(family.count)(model.config) == 2
    assert {one.name: len(one) for one in layer_stacks(model)} == {**others, stack.name: 2}
    model.save_pretrained(tmp_path)
    reloaded, notes = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(_logits(reloaded, batches[0]), skipped)
    for (part, own), (_, again) in zip(model.named_modules(), reloaded.named_modules()):
        if isinstance(getattr(own, "config", None), hf.PreTrainedConfig):
            same = [getattr(one.config, "num_layers", None) for one in (own, again)]
            assert same[0] == same[1], part


@pytest.mark.parametrize("stack", ["text_model", "vision_model"])
@torch.no_grad()
def test_either_stack_of_clip_is_shortened_and_the_model_reloads(stack: str, tmp_path: Path) -> None:
    model, batch = STRUCTURE_FAMILIES["clip"].model(), inputs_of(STRUCTURE_FAMILIES["clip"])
    lengths = {one.name: len(one) for one in layer_stacks(model)}
    full = model(**batch).logits_per_text
    drop_layers(model, DropLayers(layers=(0, 2), stack=stack))
    name = f"{stack}.encoder.layers"
    assert {one.name: len(one) for one in layer_stacks(model)} == {**lengths, name: 2}
    found = model(**batch).logits_per_text
    assert not torch.allclose(found, full, atol=1e-2)
    model.save_pretrained(tmp_path)
    reloaded, notes = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes.values())
    assert torch.equal(reloaded(**batch).logits_per_text, found)


@pytest.mark.parametrize("name", ["bart-decoder", "t5-decoder", "bart-encoder"])
def test_generation_with_cache_equals_generation_without(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    drop_layers(model, DropLayers(layers=(0, 3), stack=family.stack))
    prompt = family.batches()[0]["input_ids"][:1]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached, plain = (model.generate(prompt, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("measure", MEASURED)
@pytest.mark.parametrize("name", ["bert", "llama", "t5-decoder"])
def test_the_choice_is_the_same_every_time_and_leaves_no_trace(name: str, measure: str) -> None:
    family = FAMILIES[name]
    method = DropLayers(keep=2, stack=family.stack, **MEASURED[measure])
    batches = family.batches()
    first, second = family.model(), family.model().train()
    kept = drop_layers(first, method, batches)
    assert drop_layers(second, method, batches) == kept
    assert len(kept) == 2
    assert all(module.training for module in second.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in second.modules())
    assert getattr(second.config, "use_cache", True)


def test_block_distances_are_angles_between_hidden_states() -> None:
    family = FAMILIES["llama"]
    model, batches = family.model(), family.batches()
    found = block_distances(model, find_stack(model), 2, batches)
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0
    # the last hidden state of the output has passed the final norm, so the last layer's is taken from a hook
    last: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda layer, args, out: last.append(out))
    for batch in batches:
        with torch.no_grad():
            states = [*model(**batch, output_hidden_states=True).hidden_states[:-1], last.pop()]
        real = batch["attention_mask"].bool()
        for start in range(3):
            cosine = nn.functional.cosine_similarity(states[start][real].double(), states[start + 2][real].double())
            sums[start] += torch.arccos(cosine).sum() / math.pi
        tokens += int(real.sum())
    hook.remove()
    torch.testing.assert_close(found, sums / tokens, rtol=1e-6, atol=1e-6)


def test_angular_takes_a_block_whose_layers_undo_each_other() -> None:
    # residual branches of layers 1 and 2 cancel: each alone turns the states far, both together not at all
    model = FAMILIES["llama"].model()
    batches = FAMILIES["llama"].batches()

    class Shift(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.inner, self.by = nn.Linear(1, 1), by

        def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
            return hidden_states + self.by

    shifted = nn.ModuleList([Shift(0.002), Shift(50.0), Shift(-50.0), Shift(0.001)])
    model.model.layers = shifted
    stack = find_stack(model)
    single, double = (block_distances(model, stack, count, batches) for count in (1, 2))
    assert single.argsort()[:2].tolist() == [3, 0]
    assert int(double.argmin()) == 1
    assert float(double[1]) == pytest.approx(0.0, abs=1e-4)


def test_greedy_sees_that_two_layers_stand_in_for_each_other() -> None:
    class Toy(nn.Module):
        """The loss is high only when both of the first two layers are skipped, and a little without the third."""

        def __init__(self) -> None:
            super().__init__()
            self.config = None
            self.layers = nn.ModuleList(_Add(value) for value in (1.0, 1.0, 0.2))

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            hidden = x
            for layer in self.layers[:2]:
                hidden = layer(hidden)
            return hf.modeling_outputs.CausalLMOutput(
                loss=5 * (hidden < 0.5).float().mean() + (0.3 - self.layers[2](x)).clamp(min=0.1).mean()
            )

    class _Add(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 1)
            self.value = value

        def forward(self, x: Tensor) -> Tensor:
            return x + self.value

    model = Toy()
    batches = [{"x": torch.zeros(2), "labels": torch.zeros(2, dtype=torch.long)}]
    stack = layer_stacks(model)[0]
    assert least_loss_layers(model, stack, 2, batches, greedy=False) == [0, 1]
    assert least_loss_layers(model, stack, 2, batches, greedy=True) == [0, 2]


def test_t5_keeps_the_layer_that_holds_the_position_bias() -> None:
    family = FAMILIES["t5-decoder"]
    model, batches = family.model(), family.batches()
    _silence(find_stack(model, "decoder").layers[0])
    for measure in MEASURED.values():
        assert 0 in drop_layers(copy.deepcopy(model), DropLayers(keep=2, stack="decoder", **measure), batches)
    with pytest.raises(ModelError, match="layer 1 cannot become layer 0"):
        drop_layers(model, DropLayers(layers=(1, 2), stack="decoder"))


def _unlabelled(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches]


def _padding_only(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in batches]


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"select": "angular"}, lambda batches: None, "select='angular' is measured: drop_layers needs calibration"),
        ({"select": "loss"}, lambda batches: [], "select='loss' is measured: drop_layers needs calibration"),
        ({"select": "loss"}, _unlabelled, "every calibration batch needs labels"),
        ({"select": "angular"}, _padding_only, "nothing but padding"),
        ({"select": "angular", "stack": "decoder"}, list, "1 layer stacks .* 0 of them with 'decoder'"),
    ],
    ids=["none", "empty", "unlabelled", "padding", "stack"],
)
def test_what_cannot_be_measured_is_refused(options: dict, change: Callable, message: str) -> None:
    model = FAMILIES["llama"].model()
    with pytest.raises(HFCompressError, match=message):
        drop_layers(model, DropLayers(keep=2, **options), change(FAMILIES["llama"].batches()))
    assert len(find_stack(model)) == model.config.num_hidden_layers == LAYERS


def test_losses_that_are_not_numbers_are_refused() -> None:
    model = FAMILIES["llama"].model()
    nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(DataError, match="not finite"):
        drop_layers(model, DropLayers(keep=2, select="loss"), FAMILIES["llama"].batches())


def test_stack_of_a_model_with_several_must_be_named() -> None:
    model = FAMILIES["bart-decoder"].model()
    with pytest.raises(ModelError, match="give stack, a part of its name that no other has, such as 'decoder'"):
        drop_layers(model, DropLayers(keep=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 2, "greedy": True}, "greedy is for select 'loss' alone"),
        ({"layers": (0, 1), "select": "angular"}, "select has nothing to choose"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        DropLayers(**options)


@pytest.mark.parametrize("measure", MEASURED)
def test_the_recipes_stage_measures_on_training_rows(measure: str, tmp_path: Path, tokenizer: Any) -> None:
    tiny_llama(layers=4).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    stages = [{"drop_layers": {"keep": 2, **MEASURED[measure]}}]
    recipe = language_recipe(tmp_path / "model", write_text(tmp_path / "text.jsonl"), tmp_path / "out", stages=stages)
    job = Job(Source(recipe), tmp_path / "model", tmp_path / "work")
    rows = job.training_batches(128)
    assert sum(len(batch["input_ids"]) for batch in rows) == 128
    first = job.source.encoded("train")[0]
    assert rows[0]["labels"][0].tolist() == first["labels"]
    expected = drop_layers(job.open_model(), DropLayers(keep=2, **MEASURED[measure]), rows)
    outcome = run_stage(recipe.stages[0], job)
    assert outcome.summary == f"2 of 4 layers kept: {expected[0]}, {expected[1]}"
    assert outcome.model.config.num_hidden_layers == 2
    assert parse_recipe(recipe.to_dict()) == recipe
